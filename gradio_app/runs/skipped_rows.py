"""Rows that a run leaves out: the file that it writes them to, with the reasons."""

from __future__ import annotations

from pathlib import Path

import yaml

from lightning_peft.runs.folder import RunFolder

# Always this one, whatever name a recipe gives it: others in the folder are the run's record.
_FILE = "left-out.jsonl"


def skipped_rows_file(folder: RunFolder) -> Path:
    """Returns the file, which need not be there."""
    return folder.path / _FILE


def skips_bad_rows(recipe: str) -> bool:
    """Whether the recipe of a run skips bad rows."""
    try:
        content = yaml.safe_load(recipe)
        return content["data"]["init_args"].get("skip_bad_rows") is not None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return False

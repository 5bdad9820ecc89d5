"""Configurations and splits of cached hub datasets, without network access."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gradio_app.recipe.model_files import hub_cache
from gradio_app.runs.files import object_below, read_json_object

_MOST_BYTES = 1_000_000
# Of a data set without configurations.
DEFAULT = "default"


def known_data_sets() -> list[str]:
    """Returns the names of data sets that have been read or fetched here."""
    read = [path.name.replace("___", "/") for path in _prepared().glob("*___*") if path.is_dir()]
    fetched = [
        path.name.removeprefix("datasets--").replace("--", "/")
        for path in hub_cache().glob("datasets--*--*")
    ]
    return sorted({*read, *fetched})


def known_splits(name: str) -> dict[str, list[str]]:
    """Returns the splits of each configuration of a data set, as far as its files here say.

    They are named by what was prepared of it, and by the head of its card.

    Args:
        name: A checked name, ``namespace/name``.
    """
    found: dict[str, list[str]] = {}
    for config, split in (*_of_card(name), *_of_prepared(name)):
        splits = found.setdefault(config, [])
        if split not in splits:
            splits.append(split)
    return found


def _prepared() -> Path:
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets")


def _of_prepared(name: str) -> Iterator[tuple[str, str]]:
    folder = _prepared() / name.replace("/", "___")
    for file in sorted(folder.glob("*/*/*/dataset_info.json")):
        info = read_json_object(file)
        for split in object_below(info, "splits"):
            yield str(info.get("config_name") or file.parents[2].name), split


def _of_card(name: str) -> Iterator[tuple[str, str]]:
    snapshots = hub_cache() / f"datasets--{name.replace('/', '--')}" / "snapshots"
    for file in sorted(snapshots.glob("*/README.md")):
        head = _front_matter(file)
        for part, files in (("configs", "data_files"), ("dataset_info", "splits")):
            given = head.get(part)
            for config in given if isinstance(given, list) else [given]:
                if isinstance(config, dict):
                    named = str(config.get("config_name") or DEFAULT)
                    yield from ((named, split) for split in _split_names(config.get(files)))


def _split_names(given: Any) -> Iterator[str]:
    for one in given if isinstance(given, list) else ():
        split = one.get("split", one.get("name")) if isinstance(one, dict) else None
        if isinstance(split, str):
            yield split


def _front_matter(file: Path) -> dict[str, Any]:
    """Returns the head of a card, which stands between two lines of ``---``."""
    try:
        with file.open(encoding="utf-8") as opened:
            words = opened.read(_MOST_BYTES).split("---", 2)
        found = yaml.safe_load(words[1]) if len(words) > 2 and not words[0].strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}

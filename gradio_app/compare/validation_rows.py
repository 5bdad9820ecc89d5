"""Whether runs were validated on the same rows: else their losses are of different things."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from gradio_app.runs.files import read_json_object
from gradio_app.runs.types import Run


def same_validation_rows(runs: Sequence[Run]) -> bool:
    """Whether runs were validated on the same rows, as the same tokens.

    ``False`` also where that is not known, such as before a run has read its data.
    """
    seen = [_validation_rows(run) for run in runs]
    return None not in seen and all(one == seen[0] for one in seen)


def _validation_rows(run: Run) -> tuple[Any, ...] | None:
    data = read_json_object(run.folder.provenance, "data")
    splits = data.get("splits")
    if not data:
        return None
    if not splits or not isinstance(splits, dict):
        # A data module of somebody else: all that is known of it.
        return (data, _limit(run))
    encoding = read_json_object(run.folder.provenance, "data", "settings", "encoding")
    how = {name: encoding.get(name) for name in ("tokenizer", "chat_template", "loss_on")}
    name = str(data.get("data", "")).replace("\\", "/").rpartition("/")[2]
    rows = (name, data.get("rows"), data.get("split_by"), splits.get("validation"))
    return (*rows, how, encoding.get("system_prompt"), _limit(run))


def _limit(run: Run) -> Any:
    """Returns how many of the validation batches are looked at."""
    try:
        recipe = yaml.safe_load(run.recipe_text)
        return recipe["trainer"].get("limit_val_batches")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None

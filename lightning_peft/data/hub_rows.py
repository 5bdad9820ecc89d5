"""Rows of a dataset on the hub, read by the datasets library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from datasets import ClassLabel, load_dataset
from datasets.exceptions import DatasetNotFoundError

from lightning_peft.data.columnar import class_name, without_nulls
from lightning_peft.data.open_files import explained_rows
from lightning_peft.errors import ConfigError


def hub_dataset(data: str, config: str | None, revision: str | None, streaming: bool) -> Any:
    """Returns the splits of a dataset on the hub."""
    try:
        return load_dataset(data, config, revision=revision, streaming=streaming)
    # The library runs code of many others: requests, fsspec, pyarrow, pandas.
    except Exception as error:
        raise ConfigError(
            f"{data!r} is not a file or folder here, and the hub did not give a dataset of that "
            f"name: {_reason(error)}. Check the spelling, the network (HF_HUB_OFFLINE must not be "
            "set), hub_config, hub_revision, and `hf auth login` for a gated dataset."
        ) from error


def _reason(error: Exception) -> str:
    text, kind = str(error), type(error).__name__
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        names = re.search(r"\[(.*?)\]", text, re.DOTALL)
        listed = f" ({' '.join(names[1].split())[:300]})" if names else ""
        return f"it has several configurations{listed}, of which hub_config names one"
    if "trust_remote_code" in text or "scripts are no longer supported" in text:
        return "it is read by a script of its own, which is not run; look for a Parquet branch"
    if "gated" in text.lower():
        return "it is gated, and asks for a login"
    if isinstance(error, DatasetNotFoundError) or kind == "RepositoryNotFoundError":
        return "there is none, or it is private"
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "Connect" in kind:
        return "the hub cannot be reached, and no copy of it is on this machine"
    return "its files cannot be read as rows"


def stored_rows(dataset: Any, data: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, images and sounds as their bytes, and classes by name."""
    features = dict(dataset.features or {})
    for name, feature in features.items():
        if getattr(feature, "decode", False) is True:
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    classes = {n: feature for n, feature in features.items() if isinstance(feature, ClassLabel)}

    def explain(number: int, error: Exception) -> str:
        return (
            f"{data!r} on the hub cannot be read after row {number}: {_reason(error)}. Try again, "
            "name another hub_revision, or download its files and name their folder."
        )

    for row in explained_rows(dataset, explain):
        # What is kept as JSON has only the keys that it was given.
        nested = {
            n: without_nulls(v) for n, v in row.items() if type(features.get(n)).__name__ != "Json"
        }
        yield {**row, **nested, **{n: class_name(kind, row[n]) for n, kind in classes.items()}}

"""Check for tokens without an embedding in the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.errors import ConfigError, itemize

# Columns of prepared rows with ids of tokens; names of some end so.
_ENDINGS = ("input_ids", "labels")
_NAMES = ("texts", "pairs")


def check_vocabulary(data: Any, rows: int, model: str) -> None:
    """Refuses data with tokens, or padding, that a model has no embedding for: it has ``rows``."""
    tokenizer = getattr(data, "tokenizer", None) if isinstance(data, RowDataModule) else None
    if tokenizer is None:
        return
    last = max(tokenizer.get_vocab().values())
    # Most models have some embeddings more than tokens, and reading all rows takes time.
    if last < rows:
        return
    problems = [
        f"row {row['row']} of {row['file']!r}: the token {_named(tokenizer, token)}"
        for row, token in islice(_rows_beyond(data, rows), 3)
    ]
    filler = getattr(data, "pad_token_id", None)
    if filler is not None and filler >= rows:
        problems.append(f"padding: the token {_named(tokenizer, filler)}")
    if problems:
        raise ConfigError(
            f"{model!r} has embeddings for the tokens up to {rows - 1:,}, and the tokenizer writes "
            f"others, up to {last:,}:"
            + itemize(problems)
            + f"\nGive the data the model's own tokenizer ({model!r}), or a model with more "
            "embeddings: resize_token_embeddings, and save_pretrained."
        )


def _named(tokenizer: Any, token: int) -> str:
    return f"{token:,} ({tokenizer.convert_ids_to_tokens(token)!r})"


def _rows_beyond(data: RowDataModule, rows: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields rows with a token beyond the embeddings, each with the largest."""
    for split in data.read().splits.values():
        for name in split.column_names:
            if not (name.endswith(_ENDINGS) or name in _NAMES) or _largest(split, name) < rows:
                continue
            for row in split.select_columns([name, "file", "row"]):
                nested = row[name] if name in _NAMES else [row[name]]
                token = max((max(ids, default=0) for ids in nested), default=0)
                if token >= rows:
                    yield row, token


def _largest(split: Dataset, name: str) -> int:
    column = split.data.column(name)
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    found = pc.max(column).as_py() if pa.types.is_integer(column.type) else None
    return -1 if found is None else int(found)

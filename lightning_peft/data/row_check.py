"""Rows that are checked without a tokenizer: their content, not their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Features, Value

from lightning_peft.data.row_data_module import RowDataModule
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import SHAPES, Layout


class _NoTokens(RowEncoder):
    """Keeps nothing of a row but that it can be read."""

    features = Features({"length": Value("int32")})
    # A chat template is not known, so any of the names that templates read may be used.
    variables = frozenset()

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns one row."""
        return [{"length": 1}]


class CheckedRows(RowDataModule):
    """Rows of any shape, which are read and checked, and cannot be trained on."""

    accepts = tuple(SHAPES)
    batch_columns = ("length",)

    def encoder_for(self, layout: Layout) -> RowEncoder:
        """Returns an encoder without tokens."""
        return _NoTokens()

    def encoding(self) -> dict[str, Any]:
        """Returns a key that data with tokens never has."""
        return {"tokens": None}

    def collator(self) -> Callable[[list[Any]], Any]:
        """Returns ``list``."""
        return list

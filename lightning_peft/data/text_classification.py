"""Data for the classification of texts and text pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft.data.batching import pad_inputs
from lightning_peft.data.encoding import IGNORED, TextSpan, token_spans
from lightning_peft.data.labels import LabelledData, LabelledRows
from lightning_peft.data.samples import Sample


class TextLabelRows(LabelledRows):
    """Tokens of a text, or of two, and the name of its class."""

    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "token_type_ids": ListOf(Value("int8")),
            "label": Value("string"),
            "length": Value("int32"),
            "tokens_cut": Value("int32"),
        }
    )
    counts = ("tokens", "truncated", "tokens_cut", "contradictions")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.label_of: dict[int, str] = {}

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        label = self.names.find(sample.label or "")
        texts = [text for text in (sample.text, sample.text_pair) if text is not None]
        self.check_texts(*texts)
        tokens, cut = self.tokens(*texts)
        return [
            {
                "input_ids": tokens["input_ids"],
                "token_type_ids": tokens.get("token_type_ids", []),
                "label": label,
                "length": len(tokens["input_ids"]),
                "tokens_cut": cut,
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Adds whether an earlier row had the text with another label; collects the label."""
        label = row["label"]
        self.names.add([label])
        # Of numbers, so that it is the same in every process.
        before = self.label_of.setdefault(hash(tuple(row["input_ids"])), label)
        return {**super().count(row), "contradictions": int(before != label)}


class TextClassificationData(LabelledData):
    """Texts, each with a label, to train a classifier on.

    Rows have a ``text`` and a ``label``, and may have a ``text_pair``: then both texts are
    classified together, as in entailment. Labels are names or whole numbers. Every row is checked
    before training, and a label without a training row is named in a warning.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        labels: All names in the order of their numbers, so that a name that is none of them is
            an error; by default the names in the rows, sorted. Rows may then hold the numbers.
        over_long: Rows longer than ``max_length`` are an error, or are cut (``"truncate"``) where
            the tokenizer cuts, which is usually the end; of two texts, the longer one.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("text_label",)
    default_shape = "text_label"
    batch_columns = ("input_ids", "token_type_ids", "label")
    row_encoder = TextLabelRows

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        text = token_spans(self.tokenizer, row["input_ids"], [IGNORED] * len(row["input_ids"]))
        return [*text, TextSpan(False, "\n", []), TextSpan(True, row["label"], [])]

    def label_counts(self, split: str) -> dict[str, int]:
        column = self.read().splits[split].data.column("label")
        return {pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()}

    def collator(self) -> Callable[[list[Any]], Any]:
        numbers = {name: number for number, name in enumerate(self.labels)}
        return partial(collate_texts, pad_token_id=self.pad_token_id, numbers=numbers)


def collate_texts(
    rows: Sequence[dict[str, Any]], pad_token_id: int, numbers: dict[str, int]
) -> dict[str, Tensor]:
    """Returns a batch of texts, int64; ``labels`` are ``(batch,)``, by ``numbers``."""
    return {
        **pad_inputs(rows, pad_token_id),
        "labels": torch.tensor([numbers[row["label"]] for row in rows]),
    }

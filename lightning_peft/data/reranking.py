"""Data for rerankers: queries with relevant and irrelevant passages."""

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
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.text_pair_rows import TextPairData, TextPairRows
from lightning_peft.data.validation import EncodingProblem


class RerankingRows(TextPairRows):
    """Tokens of a query with each of its passages, and what each passage is worth."""

    features = Features(
        {
            "pairs": ListOf(ListOf(Value("int32"))),
            "types": ListOf(ListOf(Value("int8"))),
            "labels": ListOf(Value("float64")),
            "length": Value("int32"),
            "full_length": Value("int32"),
            "tokens_cut": Value("int32"),
        }
    )
    counts = ("tokens", "truncated", "tokens_cut", "passages", "contradictions")

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        self.check_texts(sample.text, sample.text_pair, *sample.negatives)
        assert sample.text is not None
        assert sample.text_pair is not None
        if sample.score is None:
            if not sample.negatives:
                raise EncodingProblem("negatives", "has no negative to compare its positive with")
            labels = [1.0, *[0.0] * len(sample.negatives)]
        elif 0 <= sample.score <= 1:
            labels = [sample.score]
        else:
            raise EncodingProblem("score", f"has the score {sample.score:g}, not one from 0 to 1")
        passages = [sample.text_pair, *sample.negatives]
        found = [self.tokens(sample.text, passage) for passage in passages]
        return [
            {
                "pairs": [tokens["input_ids"] for tokens, _ in found],
                "types": [tokens.get("token_type_ids", []) for tokens, _ in found],
                "labels": labels,
                "length": max(len(tokens["input_ids"]) for tokens, _ in found),
                "full_length": max(len(tokens["input_ids"]) + cut for tokens, cut in found),
                "tokens_cut": sum(cut for _, cut in found),
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Adds how many rows have the pair of an earlier one with another score."""
        pairs = list(zip(row["pairs"], row["labels"], strict=True))
        contradictions = sum(self.count_score(hash(tuple(p)), label) for p, label in pairs)
        tokens = sum(map(len, row["pairs"]))
        more = {"tokens": tokens, "passages": len(pairs), "contradictions": contradictions}
        return super().count({**row, "labels": (), **more})


class RerankingData(TextPairData):
    """Queries and passages to train a reranker on.

    Rows have ``query``, ``passage`` and a ``score`` or ``label`` from 0 to 1; or a ``query``, a
    ``positive`` passage, and ``negative``, ``negatives`` (a list), or ``negative_1`` to
    ``negative_10``: at least one. Every row is checked before training.

    A batch holds ``input_ids``, ``attention_mask`` and, if the tokenizer has them,
    ``token_type_ids``, each ``(pairs, length)``, of a query with one of its passages, the positive
    first; ``rows``, ``(pairs,)``: the row in the batch that a pair is from; all int64; and
    ``labels``, ``(pairs,)``, float32.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder. It joins query and passage in its own way.
        over_long: Pairs longer than ``max_length`` are an error, or are cut where the tokenizer
            cuts them (``"truncate"``): the longer text first.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    batch_columns = ("pairs", "types", "labels")

    def encoder_for(self, layout: Layout) -> RowEncoder:
        truncate = self.hparams["over_long"] == "truncate"
        return RerankingRows(self.tokenizer, self.max_length, truncate)

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        spans = []
        for ids, label in zip(row["pairs"], row["labels"], strict=True):
            spans += token_spans(self.tokenizer, ids, [IGNORED] * len(ids))
            spans += [TextSpan(True, f" {label:g}", []), TextSpan(False, "\n", [])]
        return spans

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(collate_pairs, pad_token_id=self.pad_token_id)


def collate_pairs(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of :class:`RerankingData`: the pairs of the first row, of the second, ..."""
    pairs = [
        {"input_ids": ids, "token_type_ids": types}
        for row in rows
        for ids, types in zip(row["pairs"], row["types"], strict=True)
    ]
    numbers = [number for number, row in enumerate(rows) for _ in row["pairs"]]
    labels = [label for row in rows for label in row["labels"]]
    return {
        **pad_inputs(pairs, pad_token_id),
        "rows": torch.tensor(numbers),
        "labels": torch.tensor(labels, dtype=torch.float32),
    }

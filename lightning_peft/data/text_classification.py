"""Data for the classification of texts, or of pairs of texts, as a LightningDataModule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.labelled_data import LabelledData
from lightning_peft.data.labels import LabelNames
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.token_spans import TextSpan, token_spans
from lightning_peft.data.validation import EncodingProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextLabelRows(RowEncoder):
    """Tokens of a text, or of two, and the name of its class.

    Args:
        tokenizer: The tokenizer, which adds the special tokens that its model expects.
        names: Finds labels, and collects them.
        max_length: Longest row in tokens.
        truncate: Whether longer rows are cut, instead of refused.
    """

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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: LabelNames,
        max_length: int,
        truncate: bool,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.names = names
        self.max_length = max_length
        self.truncate = truncate
        self.marks = special_tokens_in(tokenizer)
        self.label_of: dict[int, str] = {}

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the row that ``sample`` becomes.

        Raises:
            EncodingProblem: If its label is unknown, or its text has special tokens, none at all,
                or too many.
        """
        label = self.names.find(sample.label or "")
        texts = [text for text in (sample.text, sample.text_pair) if text is not None]
        check_marks(self.marks, texts)
        full = self.tokenizer(*texts, verbose=False)
        length = len(full["input_ids"])
        if length <= self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2):
            raise EncodingProblem("missing", "has a text of which the tokenizer makes no token")
        tokens = full
        if length > self.max_length:
            if not self.truncate:
                raise EncodingProblem(
                    "long", f"has {length:,} tokens, and {self.max_length:,} are allowed"
                )
            # Of a pair, the longer text is cut first.
            tokens = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        ids = tokens["input_ids"]
        types = tokens.get("token_type_ids", [])
        return [
            {
                "input_ids": ids,
                "token_type_ids": types,
                "label": label,
                "length": len(ids),
                "tokens_cut": length - len(ids),
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Returns tokens, what was cut, and whether an earlier row had the text with another label.

        The label of the row is one of those there are.
        """
        label, cut = row["label"], row["tokens_cut"]
        self.names.add([label])
        # Of numbers, so that it is the same in every process.
        before = self.label_of.setdefault(hash(tuple(row["input_ids"])), label)
        return {
            "tokens": row["length"],
            "truncated": int(cut > 0),
            "tokens_cut": cut,
            "contradictions": int(before != label),
        }

    def summary(self) -> dict[str, Any]:
        """Returns the names of all labels."""
        return {"labels": self.names.names()}


class TextClassificationData(LabelledData):
    """Texts, each with a label, to train a classifier on.

    Rows have a ``text`` and a ``label``, and may have a ``text_pair``: then both texts are
    classified together, as in entailment. Labels are names or whole numbers. Every row is checked
    before training, and a label that is in no training row is told.

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
    batch_columns = ("input_ids", "token_type_ids", "label")

    def encoder_for(self, layout: Layout) -> RowEncoder:
        """Returns the encoder of texts."""
        hparams = self.hparams
        names = LabelNames(hparams["labels"])
        truncate = hparams["over_long"] == "truncate"
        return TextLabelRows(self.tokenizer, names, self.max_length, truncate)

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        """Returns the text as the model reads it, and its label."""
        text = token_spans(self.tokenizer, row["input_ids"], [IGNORED] * len(row["input_ids"]))
        return [*text, TextSpan(False, "\n", []), TextSpan(True, row["label"], [])]

    def label_counts(self, split: str) -> dict[str, int]:
        """Returns the number of rows of each label."""
        column = self.read().splits[split].data.column("label")
        return {pair["values"]: pair["counts"] for pair in column.value_counts().to_pylist()}

    def collator(self) -> Callable[[list[Any]], Any]:
        """Returns what pads rows to a batch and numbers their labels."""
        numbers = {name: number for number, name in enumerate(self.labels)}
        return partial(collate_texts, pad_token_id=self.pad_token_id, numbers=numbers)


def collate_texts(
    rows: Sequence[dict[str, Any]], pad_token_id: int, numbers: dict[str, int]
) -> dict[str, Tensor]:
    """Returns a batch of texts.

    Args:
        rows: ``input_ids``, ``token_type_ids`` (empty where the tokenizer has none), ``label``.
        pad_token_id: Token that fills up short rows, which is not attended to.
        numbers: Name of each label to its number.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the tokenizer has them, ``token_type_ids``, each
        ``(batch, length)``, and ``labels``, ``(batch,)``; all int64.
    """
    return {
        **padded_tokens(rows, pad_token_id),
        "labels": torch.tensor([numbers[row["label"]] for row in rows]),
    }


def padded_tokens(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns ``input_ids``, ``attention_mask`` and, if there are, ``token_type_ids`` of rows."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

    mask = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
    batch = {"input_ids": filled("input_ids", pad_token_id), "attention_mask": mask}
    if rows[0]["token_type_ids"]:
        batch["token_type_ids"] = filled("token_type_ids", 0)
    return batch


def special_tokens_in(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Returns what finds the special tokens of ``tokenizer`` in a text."""
    marks = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def check_marks(marks: re.Pattern[str] | None, texts: Sequence[str]) -> None:
    """Refuses texts that a model would read as several, or as ended or padded.

    Raises:
        EncodingProblem: If a text has a special token inside.
    """
    for text in texts:
        found = marks.search(text) if marks is not None else None
        if found:
            raise EncodingProblem("control", f"has the special token {found[0]!r} inside its text")

"""Data for preference tuning and reward models: a chosen and a rejected answer per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import IGNORED, Encoded, TextSpan, token_spans
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.supervised import ConversationData, ConversationRows
from lightning_peft.data.validation import EncodingProblem

ANSWERS = ("chosen", "rejected")


class PreferenceRows(ConversationRows):
    """Tokens of a prompt with each of its two answers, and labels on the answers."""

    features = Features(
        {
            **{f"{answer}_input_ids": ListOf(Value("int32")) for answer in ANSWERS},
            **{f"{answer}_labels": ListOf(Value("int32")) for answer in ANSWERS},
            "length": Value("int32"),
            "ends_added": Value("int32"),
            "full_length": Value("int32"),
            "tokens_cut": Value("int32"),
        }
    )
    counts = (
        *("answers", "tokens", "trained_tokens", "ends_trained", "ends_added"),
        *("truncated", "tokens_cut"),
    )

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the row that ``sample`` becomes; its length is that of the longer answer."""
        both = self.pair(sample)
        lengths = [len(row.input_ids) for row in both]
        return [
            {
                **{f"{answer}_input_ids": row.input_ids for answer, row in _named(both)},
                **{f"{answer}_labels": row.labels for answer, row in _named(both)},
                "length": max(lengths),
                "ends_added": sum(row.end_added for row in both),
                "full_length": max(len(row.input_ids) + row.cut for row in both),
                "tokens_cut": sum(row.cut for row in both),
            }
        ]

    def pair(self, sample: Sample) -> list[Encoded]:
        """Returns the tokens of the prompt with the chosen and with the rejected answer."""
        sample = sample.with_system(self.system_prompt)
        check_prompt(sample)
        both = self._both(sample)
        self._check_pair(*both)
        return both

    def _both(self, sample: Sample) -> list[Encoded]:
        rows, problems = [], []
        for answer, turns in _named([sample.messages, sample.rejected]):
            try:
                rows += self.encoder.encode(Sample(turns, context=sample.context))
            except EncodingProblem as problem:
                problems.append((problem.kind, f"{problem} ({answer} answer)"))
        if problems:
            raise EncodingProblem(problems[0][0], "; ".join(text for _, text in problems))
        return rows

    def unused(self, sample: Sample) -> list[str]:
        sample = sample.with_system(self.system_prompt)
        found: list[str] = []
        for turns in (sample.messages, sample.rejected):
            found += self.encoder.unused(Sample(turns, context=sample.context))
        return list(dict.fromkeys(found))

    def _check_pair(self, chosen: Encoded, rejected: Encoded) -> None:
        if chosen.input_ids == rejected.input_ids:
            after = " after cutting" if chosen.cut or rejected.cut else ""
            raise EncodingProblem("preference", f"has two answers of the same tokens{after}")
        if _prompt(chosen) != _prompt(rejected):
            assert self.encoder.template is not None
            raise EncodingProblem(
                "template",
                "has another prompt in front of its chosen than of its rejected answer with the "
                f"chat template {self.encoder.template.name}, so that they cannot be compared",
            )

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        both = [row[f"{answer}_labels"] for answer in ANSWERS]
        labels = [label for one in both for label in one]
        counts = super().count(
            {**row, "labels": labels, "tokens": len(labels), "answers": len(both)}
        )
        return {**counts, "ends_trained": sum(self.end in one for one in both)}


def check_prompt(sample: Sample) -> None:
    """Refuses a row whose turns are all the model's."""
    if all(message["role"] in ("system", "assistant") for message in sample.messages):
        raise EncodingProblem(
            "missing", "has no prompt: nothing shows where it ends and the answers begin"
        )


def _named(both: Sequence[Any]) -> list[tuple[str, Any]]:
    return list(zip(ANSWERS, both, strict=True))


def _prompt(row: Encoded) -> list[int]:
    first = next(place for place, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:first]


class PreferenceData(ConversationData):
    """Prompts with a chosen and a rejected answer, for preference tuning and reward models.

    Every row is checked before training. Rows with problems are an error that lists all of them,
    unless ``skip_bad_rows`` is given. Labels are on the answer, the last turn, and on its end.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, each ``(2 * rows, length)``,
    int64: first all chosen answers, then the rejected ones in the same order.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        chat_template: ``"chatml"``, ``"plain"``, ``"raw"`` or Jinja source; by default the
            tokenizer's own.
        system_prompt: System turn of conversations that have none.
        reasoning: What becomes of thoughts in answers: ``"train"``, ``"mask"`` or ``"strip"``; see
            :class:`SupervisedData <lightning_peft.data.supervised.SupervisedData>`.
        chat_template_kwargs: Values for variables of the chat template, such as
            ``{"enable_thinking": False}``; a row's own come first.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`;
            ``batch_size`` counts pairs.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("preference",)
    batch_columns = tuple(
        f"{answer}_{kind}" for answer in ANSWERS for kind in ("input_ids", "labels")
    )

    def encoder_for(self, layout: Layout) -> RowEncoder:
        return PreferenceRows(self.encoder("completion"), self.hparams["system_prompt"])

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        spans = []
        for answer in ANSWERS:
            spans.append(TextSpan(False, f"[{answer}]\n", []))
            ids, labels = row[f"{answer}_input_ids"], row[f"{answer}_labels"]
            spans += [*token_spans(self.tokenizer, ids, labels), TextSpan(False, "\n", [])]
        return spans

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(collate, pad_token_id=self.pad_token_id)


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of :class:`PreferenceData`."""
    kinds = ("input_ids", "labels")
    both = [{kind: row[f"{name}_{kind}"] for kind in kinds} for name in ANSWERS for row in rows]
    return pad(both, pad_token_id)

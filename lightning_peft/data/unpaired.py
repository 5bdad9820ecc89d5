"""Data for Kahneman-Tversky optimization: answers labelled as desirable or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Features, Value
from torch import Tensor

from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import IGNORED, TextSpan, token_spans
from lightning_peft.data.preference import PreferenceRows, check_prompt
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import DESIRABLE, Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.supervised import ConversationData, ConversationRows
from lightning_peft.errors import ConfigError

_KINDS = ("input_ids", "labels")


class UnpairedRows(ConversationRows):
    """Tokens of a prompt with one answer, labels on the answer, and whether it is desirable."""

    features = Features({**ConversationRows.token_features, "desirable": Value("bool")})
    counts = (
        *("desirable", "tokens", "trained_tokens", "ends_trained", "ends_added"),
        *("truncated", "tokens_cut"),
    )

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the row that ``sample`` becomes, or two of a chosen and a rejected answer."""
        if sample.rejected:
            rows = self._pairs.pair(sample)
            desirable = [True, False]
        else:
            sample = sample.with_system(self.system_prompt)
            check_prompt(sample)
            rows = self.encoder.encode(replace(sample, label=None))
            desirable = [sample.label == DESIRABLE]
        return [
            self.columns(row, desirable=wanted) for row, wanted in zip(rows, desirable, strict=True)
        ]

    def unused(self, sample: Sample) -> list[str]:
        if sample.rejected:
            return self._pairs.unused(sample)
        return self.encoder.unused(sample.with_system(self.system_prompt))

    @property
    def _pairs(self) -> PreferenceRows:
        return PreferenceRows(self.encoder, self.system_prompt)


class UnpairedPreferenceData(ConversationData):
    """Prompts with an answer each, and whether it is desirable.

    Rows hold ``prompt``, ``completion`` and ``label`` (true or false), or, as for
    :class:`PreferenceData <lightning_peft.data.preference.PreferenceData>`, a chosen and a rejected
    answer, which become two rows. Every row is checked before training. Rows with problems are an
    error that lists all of them, unless ``skip_bad_rows`` is given. Labels of tokens are on the
    answer, the last turn, and on its end.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, length)``, int64,
    and ``desirable``, ``(rows,)``, bool. ``kl_input_ids``, ``kl_attention_mask`` and ``kl_labels``,
    each ``(rows, other length)``, are the prompts with an answer to another prompt of the batch,
    from which the divergence is estimated; they are cut to ``max_length``. Where the batch has no
    other prompt, nothing has a label there.

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
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("unpaired", "preference")
    batch_columns = (*_KINDS, "desirable")

    def encoder_for(self, layout: Layout) -> RowEncoder:
        return UnpairedRows(self.encoder("completion"), self.hparams["system_prompt"])

    def setup(self, stage: str) -> None:
        """Opens the prepared rows, and checks that there are rows of both labels."""
        super().setup(stage)
        desirable, undesirable = label_counts(self.read().summary)
        if not desirable or not undesirable:
            label = "true" if desirable else "false"
            raise ConfigError(
                f"All {desirable + undesirable:,} training rows of {self.hparams['data']!r} have "
                f"the label {label}, so nothing shows what is to be avoided or what is wanted. Add "
                "rows of the other label; where all answers are good, fine-tune on them with "
                "CausalLM and SupervisedData."
            )

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        label = "desirable" if row["desirable"] else "undesirable"
        return [
            TextSpan(False, f"[{label}]\n", []),
            *token_spans(self.tokenizer, row["input_ids"], row["labels"]),
        ]

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(collate, pad_token_id=self.pad_token_id, max_length=self.max_length)


def label_counts(summary: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of desirable and of undesirable training rows of prepared data."""
    counts = summary["splits"]["train"]
    return counts["desirable"], counts["rows"] - counts["desirable"]


def collate(
    rows: Sequence[dict[str, Any]], pad_token_id: int, max_length: int
) -> dict[str, Tensor]:
    """Returns a batch of :class:`UnpairedPreferenceData`.

    Each prompt comes once more, before the answer of the last row before it with another prompt,
    as a circle; where the batch has one prompt alone, no token of it counts.
    """
    mismatched = [_mismatched(rows, place, max_length) for place in range(len(rows))]
    return {
        **pad(rows, pad_token_id),
        "desirable": torch.tensor([row["desirable"] for row in rows]),
        **{f"kl_{name}": tensor for name, tensor in pad(mismatched, pad_token_id).items()},
    }


def _mismatched(
    rows: Sequence[dict[str, Any]], place: int, max_length: int
) -> dict[str, list[int]]:
    own = rows[place]
    start = _prompt_length(own)
    prompt = own["input_ids"][:start]
    for other in (rows[place - step] for step in range(1, len(rows))):
        first = _prompt_length(other)
        if other["input_ids"][:first] != prompt:
            return {k: [*own[k][:start], *other[k][first:]][:max_length] for k in _KINDS}
    length = len(own["input_ids"][:max_length])
    return {"input_ids": own["input_ids"][:length], "labels": [IGNORED] * length}


def _prompt_length(row: dict[str, Any]) -> int:
    return next(place for place, label in enumerate(row["labels"]) if label != IGNORED)

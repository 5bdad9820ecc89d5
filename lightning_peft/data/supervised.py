"""Data for supervised fine-tuning of causal language models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from datasets import Features, Value
from datasets import Sequence as ListOf
from torch import Tensor

from lightning_peft import engine
from lightning_peft.data import packing as packed
from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import Encoded, Encoder, LossOn, OverLong, TextSpan, token_spans
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout
from lightning_peft.data.templates import find_template
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.data.turns import Reasoning
from lightning_peft.errors import ConfigError


class ConversationRows(RowEncoder):
    """Encodes conversations; those without a system turn get ``system_prompt``."""

    parallelizable = resumable = True
    # Of what `columns` returns, and what is counted of it.
    token_features = {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "length": Value("int32"),
        "end_added": Value("bool"),
        "tokens_cut": Value("int32"),
    }

    token_counts = (
        *("tokens", "trained_tokens", "ends_trained", "ends_added", "truncated", "tokens_cut"),
    )

    def __init__(self, encoder: Encoder, system_prompt: str | None = None) -> None:
        self.encoder, self.end = encoder, encoder.end
        self.variables = encoder.variables
        self.system_prompt = system_prompt

    def unused(self, sample: Sample) -> list[str]:
        return self.encoder.unused(sample.with_system(self.system_prompt))

    def summary(self) -> dict[str, Any]:
        template = self.encoder.template
        return {"template": template and {"name": template.name, "text": template.text}}

    def columns(self, row: Encoded, **others: Any) -> dict[str, Any]:
        """Returns the columns of a row of tokens, and ``others``."""
        return {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "length": len(row.input_ids),
            "end_added": row.end_added,
            "tokens_cut": row.cut,
            **others,
        }


class ConversationData(TokenizedData):
    """Rows that are rendered by a chat template; arguments as of :class:`SupervisedData`."""

    # Arguments that decide the tokens and labels of a row.
    encoding_arguments: ClassVar[tuple[str, ...]] = (
        "chat_template",
        "system_prompt",
        "reasoning",
        "chat_template_kwargs",
    )

    def __init__(
        self,
        data: str,
        tokenizer: str,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        reasoning: Reasoning = "train",
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, tokenizer, **options)

    def encoder(self, loss_on: LossOn, plain_text: bool = False) -> Encoder:
        """Returns the encoder of turns, or of plain text."""
        hparams = self.hparams
        template = None if plain_text else find_template(self.tokenizer, hparams["chat_template"])
        return Encoder(
            self.tokenizer,
            template,
            self.max_length,
            loss_on,
            hparams["over_long"],
            hparams["reasoning"],
            hparams["chat_template_kwargs"],
        )

    def encoding(self) -> dict[str, Any]:
        arguments = {name: self.hparams[name] for name in self.encoding_arguments}
        template = getattr(self.tokenizer, "chat_template", None)
        return {**super().encoding(), **arguments, "tokenizers_template": template}


class SupervisedRows(ConversationRows):
    """Tokens of a row, with labels on what is trained."""

    features = Features({**ConversationRows.token_features, "part": Value("int32")})
    counts = (*ConversationRows.token_counts, "further_parts")

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        rows = self.encoder.encode(sample.with_system(self.system_prompt))
        return [self.columns(row, part=part) for part, row in enumerate(rows, start=1)]

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        return super().count({**row, "further_parts": row["part"] > 1})


class SupervisedData(ConversationData):
    """Examples to fine-tune a causal language model on.

    Every row is checked before training. Rows with problems are an error that lists all of them,
    unless ``skip_bad_rows`` is given. Tokens are kept on disk and shared between runs.

    Args:
        data: File (JSONL, JSON, CSV, TSV, Parquet, text), folder of such, or dataset on the hub.
        tokenizer: Name on the hub, or folder.
        shape: ``"auto"``, or one of ``"messages"``, ``"alpaca"``, ``"prompt_completion"``,
            ``"text"``.
        chat_template: ``"chatml"``, ``"plain"``, ``"raw"`` or Jinja source; by default the
            tokenizer's own.
        system_prompt: System turn of conversations that have none.
        loss_on: ``"assistant"`` trains every assistant turn, ``"completion"`` the last one only.
        over_long: Rows longer than ``max_length`` are an error, or are cut at the end
            (``"truncate"``), or, for plain text, split.
        reasoning: What becomes of thoughts in answers (``reasoning_content``, ``<think>``):
            ``"train"`` learns them as the template writes them, ``"mask"`` leaves them in the text
            without learning them, ``"strip"`` takes them out.
        chat_template_kwargs: Values for variables of the chat template, such as
            ``{"enable_thinking": False}``; a row's own come first.
        packing: Put several examples in a row of ``max_length`` tokens, kept apart exactly.
        **options: Keyword arguments of
            :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>` and
            :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    accepts = ("messages", "alpaca", "prompt_completion", "text")
    batch_columns = ("input_ids", "labels")
    encoding_arguments = (*ConversationData.encoding_arguments, "loss_on")

    def __init__(
        self,
        data: str,
        tokenizer: str,
        shape: Literal["auto", "messages", "alpaca", "prompt_completion", "text"] = "auto",
        chat_template: str | None = None,
        system_prompt: str | None = None,
        loss_on: LossOn = "assistant",
        over_long: OverLong = "error",
        reasoning: Reasoning = "train",
        chat_template_kwargs: dict[str, Any] | None = None,
        packing: bool = False,
        **options: Any,
    ) -> None:
        self._checked: object = None
        super().__init__(data, tokenizer, over_long=over_long, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        if self.hparams["packing"] and self.hparams["length_grouping"]:
            problems.append("packing leaves no padding for length_grouping to save; drop one")
        return problems

    def encoder_for(self, layout: Layout) -> RowEncoder:
        hparams = self.hparams
        plain = layout.shape.name == "text"
        if hparams["over_long"] == "split" and not plain:
            raise ConfigError(
                f'over_long="split" is for plain text, and the rows are {layout.shape.title}: the '
                'second half would have no prompt. Use "truncate", or raise max_length.'
            )
        if plain and hparams["system_prompt"] is not None:
            raise ConfigError(
                f"system_prompt={hparams['system_prompt']!r} is given, and plain text has no "
                "turns. Leave it out."
            )
        return SupervisedRows(self.encoder(hparams["loss_on"], plain), hparams["system_prompt"])

    def render_row(self, row: dict[str, Any]) -> list[TextSpan]:
        return token_spans(self.tokenizer, row["input_ids"], row["labels"])

    def rows(self, split: str) -> Any:
        """Returns the rows, several to a row if packed."""
        rows = super().rows(split)
        if not self.hparams["packing"]:
            return rows
        return packed.PackedRows(rows, self.read().lengths(split), self.max_length)

    def collator(self) -> Callable[[list[Any]], Any]:
        return partial(
            packed.collate if self.hparams["packing"] else pad, pad_token_id=self.pad_token_id
        )

    def on_after_batch_transfer(
        self, batch: dict[str, Tensor], dataloader_idx: int
    ) -> dict[str, Tensor]:
        """Fits the mask of packed rows to the model, which is tried on the first of them."""
        if not self.hparams["packing"] or self.trainer is None:
            return batch
        whole = self.trainer.lightning_module
        model = packed.language_model(whole)
        if self._checked is not model:
            engine.call_inside(whole, partial(packed.check_model, model, self.max_length))
            self._checked = model
        return packed.to_model(batch, model, whole)

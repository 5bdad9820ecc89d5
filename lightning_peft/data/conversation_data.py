"""Conversations as tokens: the base of supervised and of preference data."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_peft.data.encoding import Encoder, LossOn
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.templates import find_template
from lightning_peft.data.tokenized import TokenizedData


class ConversationRows(RowEncoder):
    """Encodes conversations; those without a system turn get ``system_prompt``."""

    parallelizable = True

    def __init__(self, encoder: Encoder, system_prompt: str | None = None) -> None:
        self.encoder = encoder
        self.variables = encoder.variables
        self.system_prompt = system_prompt

    def summary(self) -> dict[str, Any]:
        """Returns the template."""
        template = self.encoder.template
        return {"template": template and {"name": template.name, "text": template.text}}


class ConversationData(TokenizedData):
    """Rows that are rendered by a chat template."""

    # Arguments that decide the tokens and labels of a row.
    encoding_arguments: ClassVar[tuple[str, ...]] = (
        "chat_template",
        "system_prompt",
        "reasoning",
        "chat_template_kwargs",
    )

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
        """Returns everything that decides the tokens and labels of a row."""
        arguments = {name: self.hparams[name] for name in self.encoding_arguments}
        template = getattr(self.tokenizer, "chat_template", None)
        return {**super().encoding(), **arguments, "tokenizers_template": template}

"""What a model generates for validation rows while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GeneratedSample:
    """One generation beside what was expected.

    Attributes:
        prompt: What the model was given, as text.
        expected: What the row says.
        generated: What the model says.
    """

    prompt: str
    expected: str
    generated: str


class Generates(Protocol):
    """A task whose model generates text."""

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns greedy generations for prepared rows of the data module, in their order."""


@torch.no_grad()
def continue_greedily(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Returns what ``model`` generates for one row, greedily and in eval mode.

    Args:
        model: A model that generates; its modes are as before when this returns.
        inputs: What ``generate`` takes, of one row.
        **options: For ``generate``, such as ``max_new_tokens``.

    Returns:
        Tokens, ``(length,)``; of a causal model with those of the prompt.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        generate: Any = model.generate
        tokens: Tensor = generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            do_sample=False,
            num_beams=1,
            **options,
        )
    finally:
        for module, training in modes.items():
            module.training = training
    return tokens[0]

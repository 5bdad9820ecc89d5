"""What a model generates for validation rows while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_peft import engine
from lightning_peft.data.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GeneratedSample:
    """One generation and the expected text.

    Attributes:
        prompt: What the model was given, as text.
        expected: What the row says.
        generated: What the model says.
        cut: Whether it was ended at the most tokens that it may have, not by the model; ``None``
            where that is not known.
    """

    prompt: str
    expected: str
    generated: str
    cut: bool | None = None


class GeneratesSamples(Protocol):
    """A task whose model generates text."""

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns greedy generations for prepared rows of the data module, in their order."""


@torch.no_grad()
def generate_greedily(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Returns the output of ``model``, greedy and in eval mode: tokens, ``(batch, length)``.

    Those of a causal model begin with the prompt. The modes of the model are as before.
    """
    generate: Any = model.generate
    with engine.in_eval_mode(model):
        tokens: Tensor = generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            do_sample=False,
            num_beams=1,
            **options,
        )
    return tokens


def answer(task: Any, ids: list[int], labels: list[int], max_new_tokens: int) -> GeneratedSample:
    """Returns the answer of the causal language model of ``task`` to the prompt of a row.

    A prompt is what comes before the first token with a label; of plain text, the first half.
    """
    tokenizer = task.trainer.datamodule.tokenizer
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    first = first if first > 1 else -(-len(ids) // 2)
    prompt = torch.tensor([ids[:first]])
    filler = tokenizer.pad_token_id
    (tokens,) = generate_greedily(
        task.model,
        {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)},
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if filler is None else filler,
    )
    new_tokens = tokens[first:].tolist()
    prompt, expected, generated = (
        tokenizer.decode(text, skip_special_tokens=True)
        for text in (ids[:first], ids[first:], new_tokens)
    )
    cut = len(new_tokens) >= max_new_tokens and new_tokens[-1] != tokenizer.eos_token_id
    return GeneratedSample(prompt, expected, generated, cut)

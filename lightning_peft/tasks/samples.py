"""What a model generates for validation rows while it is trained."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.transformers import is_recurrent
from lightning_peft.data.batching import pad_left
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.end_tokens import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Prompts that are generated for at the same time.
BATCH_SIZE = 16


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


def answers(
    task: Any, rows: list[tuple[list[int], list[int]]], max_new_tokens: int
) -> list[GeneratedSample]:
    """Returns the answers of the causal language model of ``task`` to the prompts of rows.

    A row is token ids and labels, a prompt what comes before the first token with a label; of plain
    text, the first half. Prompts are generated for together, padded on the left.
    """
    prompts = [ids[: _prompt_length(ids, labels)] for ids, labels in rows]
    generated: dict[int, GeneratedSample] = {}
    for places in generation_batches(task.model, prompts):
        texts = _generate(task, [prompts[place] for place in places], max_new_tokens)
        for place, (text, cut) in zip(places, texts, strict=True):
            rest = rows[place][0][len(prompts[place]) :]
            prompt, expected = (_decode(task, ids) for ids in (prompts[place], rest))
            generated[place] = GeneratedSample(prompt, expected, text, cut)
    return [generated[place] for place in range(len(rows))]


def _prompt_length(ids: list[int], labels: list[int]) -> int:
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    return first if first > 1 else -(-len(ids) // 2)


def generation_batches(
    model: Any, prompts: list[list[int]], most: int = BATCH_SIZE
) -> list[list[int]]:
    """Returns places of ``prompts``, near lengths together, ``most`` in a batch.

    Padding in front shifts the positions of models that take none, and enters the state of
    recurrent ones: their batches have prompts of one length.
    """
    padded = "position_ids" in inspect.signature(model.forward).parameters and not is_recurrent(
        model
    )
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        last = batches[-1] if batches else []
        same = last and (padded or len(prompts[last[0]]) == len(prompts[place]))
        if same and len(last) < most:
            last.append(place)
        else:
            batches.append([place])
    return batches


def _generate(task: Any, prompts: list[list[int]], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Returns the text that follows each prompt, and whether it reached ``max_new_tokens``."""
    tokenizer = task.trainer.datamodule.tokenizer
    ends, filler = end_tokens(task.model, tokenizer), tokenizer.pad_token_id
    filler = (ends[-1] if ends else 0) if filler is None else filler
    inputs = pad_left(prompts, filler)
    length = inputs["input_ids"].shape[1]
    tokens = generate_greedily(
        task.model,
        inputs,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=filler,
    )
    texts = []
    for new_tokens in tokens[:, length:].tolist():
        kept = list(takewhile(lambda token: token not in ends, new_tokens))
        texts.append((_decode(task, kept), len(kept) == len(new_tokens)))
    return texts


def _decode(task: Any, ids: list[int]) -> str:
    text: str = task.trainer.datamodule.tokenizer.decode(ids, skip_special_tokens=True)
    return text

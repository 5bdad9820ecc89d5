"""Batched generation of answers during training, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.end_tokens import end_tokens
from lightning_peft.generation import continuations, without_settings_of_base


@dataclass(frozen=True)
class Sampling:
    """How answers are generated: ``longest`` tokens, ``count`` for each prompt, 0 for greedy."""

    longest: int
    count: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """Answers to the prompts of a batch, those to one prompt next to each other.

    Attributes:
        batch: ``input_ids``, ``attention_mask`` and ``labels`` of prompts with answers, each
            ``(answers, length)``, int64, padded on the right; labels on the answers.
        mask: Where a token of an answer is predicted, ``(answers, length - 1)``, bool.
        tokens: Ids of each answer, with its end token where it has one.
        texts: The answers without special tokens.
        cut: Whether an answer has no end token, ``(answers,)``, bool.
    """

    batch: dict[str, Tensor]
    mask: Tensor
    tokens: list[list[int]]
    texts: list[str]
    cut: Tensor

    def completions(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        """Returns the answers as reward functions get them: turns where the prompt is turns."""
        return [
            [{"role": "assistant", "content": text}] if isinstance(row["prompt"], list) else text
            for row, text in zip(rows, self.texts, strict=True)
        ]


@dataclass
class Rollout:
    """Judged answers, and what the steps that learn from them have in common.

    ``mask`` are the tokens that count, ``old`` and ``reference`` log-probabilities, each
    ``(answers, length - 1)``; ``advantages`` are ``(answers,)``; ``measured`` are scalars to log.
    """

    batch: dict[str, Tensor]
    mask: Tensor
    advantages: Tensor
    measured: dict[str, Tensor]
    old: Tensor | None = None
    reference: Tensor | None = None


def answers_to(task: Any, batch: dict[str, Any], sampling: Sampling) -> Answers:
    """Returns answers of the model of ``task`` to the prompts of a batch of ``PromptData``.

    The model is in eval mode meanwhile, and the random numbers of the run are as before.
    """
    model, tokenizer = task.model, task.trainer.datamodule.tokenizer
    filler = tokenizer.pad_token_id
    ends = end_tokens(model, tokenizer)
    filler = (ends[-1] if ends else 0) if filler is None else filler
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        for _ in range(max(1, sampling.count))
    ]
    config = _config(ends, filler, sampling)
    devices = [model.device] if model.device.type == "cuda" else []
    # Drawn from the distribution of the loss: no penalties, no other cuts.
    with without_settings_of_base(model), torch.random.fork_rng(devices):
        torch.manual_seed(sampling.seed)
        answers = continuations(model, prompts, filler, len(prompts), generation_config=config)
    # Under autocast, casts that were made here would have no gradient.
    torch.clear_autocast_cache()
    ended = [_ended(answer, ends) for answer in answers]
    rows = [
        {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
        for prompt, answer in zip(prompts, ended, strict=True)
    ]
    padded = {name: one.to(model.device) for name, one in pad(rows, filler).items()}
    return Answers(
        padded,
        padded["labels"][:, 1:] != IGNORED,
        ended,
        tokenizer.batch_decode(ended, skip_special_tokens=True),
        torch.tensor([one[-1] not in ends for one in ended], device=model.device),
    )


def _config(ends: list[int], filler: int, sampling: Sampling) -> GenerationConfig:
    drawn = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }
    return GenerationConfig(
        max_new_tokens=sampling.longest,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=filler,
        use_cache=True,
        **(drawn if sampling.count else {"do_sample": False}),
    )


def _ended(tokens: list[int], ends: list[int]) -> list[int]:
    """Returns tokens up to the first end token."""
    places = (place for place, token in enumerate(tokens) if token in ends)
    return tokens[: next(places, len(tokens)) + 1]

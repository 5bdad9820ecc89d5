"""Samples generated for validation rows during training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.end_tokens import end_tokens
from lightning_peft.generation import continuations


@dataclass(frozen=True)
class GeneratedSample:
    """One generation and the expected text; ``cut`` is ``None`` where the end is not known."""

    prompt: str
    expected: str
    generated: str
    cut: bool | None = None


def answers(
    task: Any, rows: list[tuple[list[int], list[int]]], max_new_tokens: int
) -> list[GeneratedSample]:
    """Returns the answers of the causal language model of ``task`` to the prompts of rows.

    A row is token ids and labels, a prompt what comes before the first label; of plain text, the
    first half. Prompts are generated for together, padded on the left.
    """
    prompts = [ids[: _prompt_length(ids, labels)] for ids, labels in rows]
    tokenizer = task.trainer.datamodule.tokenizer
    ends, filler = end_tokens(task.model, tokenizer), tokenizer.pad_token_id
    filler = (ends[-1] if ends else 0) if filler is None else filler
    found = continuations(
        task.model, prompts, filler, eos_token_id=ends or None, max_new_tokens=max_new_tokens
    )
    samples = []
    for (ids, _), prompt, new in zip(rows, prompts, found, strict=True):
        kept = list(takewhile(lambda token: token not in ends, new))
        asked, expected, generated = (
            tokenizer.decode(part, skip_special_tokens=True)
            for part in (prompt, ids[len(prompt) :], kept)
        )
        cut = len(kept) == len(new)
        samples.append(GeneratedSample(asked, expected, generated, cut))
    return samples


def _prompt_length(ids: list[int], labels: list[int]) -> int:
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    return first if first > 1 else -(-len(ids) // 2)

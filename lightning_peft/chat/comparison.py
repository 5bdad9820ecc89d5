"""Comparison of a base with its adapters: answers side by side, or losses on data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.chat.answer_scores import score_answer
from lightning_peft.chat.chat_model import Answer, ChatModel
from lightning_peft.chat.images import with_decoded_images
from lightning_peft.data.batching import pad
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.row_keys import KeyCount, check_column, unread_columns
from lightning_peft.data.validation import describe
from lightning_peft.errors import ConfigError, itemize
from lightning_peft.json_equality import json_object
from lightning_peft.runs.integrity import run_of

if TYPE_CHECKING:
    from lightning_peft.data.supervised import SupervisedData

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
SPLITS = ("train", "validation", "test")
# Prompts that are answered at the same time.
TOGETHER = 8


@dataclass(frozen=True)
class Prompt:
    """A question, and what a good answer would be where that is known."""

    text: str
    reference: str | None = None
    # Turns before the question, perhaps a system turn first.
    earlier: Sequence[dict[str, Any]] = ()
    # Bytes of the image files that the question is about.
    images: Sequence[bytes] = ()


def held_out_prompts(folder: Path, limit: int | None = None) -> list[Prompt]:
    """Returns the validation rows that a run kept, with system prompt and earlier turns."""
    run = run_of(folder)
    file = run.prompts if run is not None else None
    rows = _held_out_rows(file) if file is not None and file.is_file() else []
    if not rows:
        raise ConfigError(
            f"{str(folder)!r} has no held-out rows: they are in prompts.json of a run that was "
            "validated on conversations. Give rows with --prompts FILE.jsonl."
        )
    prompts = []
    for row in rows[:limit]:
        *earlier, question, answer = with_decoded_images(row)
        images = question.get("images", ())
        prompts.append(Prompt(question["content"], answer["content"], earlier, images))
    return prompts


def _held_out_rows(file: Path) -> list[list[dict[str, Any]]]:
    content = json_object(file.read_text(encoding="utf-8")) or {}
    rows = content.get("held_out")
    if not isinstance(rows, list):
        return []
    # Of older runs, answers may be empty: those that were calls of tools.
    return [turns for turns in rows if len(turns) > 1 and str(turns[-1]["content"]).strip()]


def read_prompts(file: str) -> list[Prompt]:
    """Returns the prompts in a file: one a line, or JSONL with ``prompt`` and ``reference``."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file!r} cannot be read as text: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompts {file!r} has no line with a prompt.")
    if not file.endswith((".jsonl", ".ndjson")):
        return [Prompt(line.strip()) for _, line in numbered]
    prompts, bad = [], []
    unused, refused = KeyCount(), []
    for number, line in numbered:
        row = json_object(line) or {}
        for name, value in unread_columns(row, ("prompt", "reference", "response")).items():
            problems = check_column(name, value, True, True, False)
            refused += [f"line {number} has {name}"] if problems else []
            unused.add([name] if problems == [] else [], file, number)
        text, reference = row.get("prompt"), row.get("reference", row.get("response"))
        if isinstance(text, str) and text.strip():
            prompts.append(Prompt(text, reference if isinstance(reference, str) else None))
        else:
            bad.append(str(number))
    if bad:
        raise ConfigError(
            f"--prompts {file!r}: line {', '.join(bad[:12])} is not a JSON object with a text "
            "called `prompt`."
        )
    if refused:
        raise ConfigError(
            f"--prompts {file!r} has more than prompts, which would be answered without it. Take "
            "it out, or give it with --system, --tools or --chat-template-kwargs:"
            + itemize(refused)
        )
    keys = [f"{key['key']!r} (lines {key['rows'][file]})" for key in unused.summary()]
    if keys:
        log.warning(f"Keys of {file!r} that are not used: {', '.join(keys)}.")
    return prompts


def answers(
    chat_model: ChatModel,
    prompts: Sequence[Prompt],
    system: str | None,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    names: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the answers to each prompt, and their scores; each begins a new conversation.

    ``system`` is for prompts without a system turn; ``names`` are by default the base and every
    adapter. Once ``stop()`` is true, answers that are not whole are left out.

    Rows have ``prompt``, ``answers`` by name and ``cut``, the names of those whose answers ended at
    the most tokens; where a reference is known, it and by name the ``scores``, as
    :class:`AnswerScore <lightning_peft.chat.answer_scores.AnswerScore>` names them.
    """
    asked = list(chat_model.names if names is None else names)
    opening = [{"role": "system", "content": system}] if system else []
    done, total = 0, len(prompts) * len(asked)
    for start in range(0, len(prompts), TOGETHER):
        some = prompts[start : start + TOGETHER]
        talks = []
        for prompt in some:
            own = bool(prompt.earlier) and prompt.earlier[0]["role"] == "system"
            question: dict[str, Any] = {"role": "user", "content": prompt.text}
            if prompt.images:
                question["images"] = list(prompt.images)
            talks.append([*([] if own else opening), *prompt.earlier, question])
        found: list[dict[str, Answer]] = [{} for _ in some]
        for name in asked:
            chat_model.switch(name)
            for by_name, answer in zip(found, chat_model.answers(talks, stop), strict=True):
                by_name[name] = answer
            if stop():
                return
            done += len(some)
            progress("answering", done, total)
        for prompt, by_name in zip(some, found, strict=True):
            yield _row(prompt, by_name)


def _row(prompt: Prompt, answers: dict[str, Answer]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": prompt.text,
        "answers": {name: answer.text for name, answer in answers.items()},
        "cut": [name for name, answer in answers.items() if not answer.ended],
    }
    if not prompt.reference:
        return row
    scores = {
        name: asdict(score_answer(text, prompt.reference)) for name, text in row["answers"].items()
    }
    return row | {"reference": prompt.reference, "scores": scores}


@dataclass
class Score:
    """How well the base or an adapter predicts the answers in data."""

    name: str
    # Mean negative log-likelihood per answer token, in nats.
    loss: float
    perplexity: float
    # Share of the answer tokens that are the likeliest ones, each given those before it.
    token_accuracy: float
    tokens: int
    # Loss, hits and tokens of each row.
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures without those of the rows."""
        return {key: value for key, value in asdict(self).items() if key != "rows"}


def scores(
    chat_model: ChatModel, data: SupervisedData, split: str, progress: Progress
) -> list[Score]:
    """Returns the scores of the base and of every adapter on the trained tokens of data.

    The data's tokenizer is the base's; ``split`` may be ``"all"``.
    """
    rows = _rows_of(data, split)
    size, filler = data.batch_size, data.tokenizer.pad_token_id
    filler = data.tokenizer.eos_token_id if filler is None else filler
    # Rows of like length together; where they were is put back at the end.
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    results: list[Score] = []
    for turn, name in enumerate(chat_model.names):
        chat_model.switch(name)
        per_row: list[dict[str, Any]] = [{} for _ in rows]
        for number, places in enumerate(batches):
            batch = pad([rows[place] for place in places], filler)
            with chat_model.activated() as model:
                measured = _measure(model, {k: v.to(model.device) for k, v in batch.items()})
            for place, score in zip(places, measured, strict=True):
                per_row[place] = score
            done = turn * len(batches) + number + 1
            progress("scoring", done, len(batches) * len(chat_model.names))
        results.append(_score(name, per_row))
    return results


def _rows_of(data: SupervisedData, split: str) -> list[dict[str, Any]]:
    prepared = data.read()
    if prepared.problems:
        raise ConfigError(
            "The data cannot be compared on. "
            + describe(prepared.problems, prepared.summary["rows"])
        )
    splits = SPLITS if split == "all" else (split,)
    rows = [dict(row) for one in splits if one in prepared.splits for row in prepared.splits[one]]
    if not rows:
        there = ", ".join(f"{name} ({len(prepared.splits[name]):,})" for name in prepared.splits)
        raise ConfigError(
            f"The data has no rows for {split!r}; it has {there}. Choose another --split, or 'all'."
        )
    return rows


def _measure(model: Any, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Returns summed loss, hits and tokens of each row of a batch."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    counted = labels != IGNORED
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    # Only where there is a label: float32 logits of the rest would be most of the memory.
    chosen = logits[counted].float()
    losses[counted] = F.cross_entropy(chosen, labels[counted], reduction="none")
    hits = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    hits[counted] = chosen.argmax(-1) == labels[counted]
    columns = (losses.double().sum(1), hits.sum(1), counted.sum(1))
    return [
        {"loss": loss, "hits": int(hit), "tokens": int(tokens)}
        for loss, hit, tokens in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _score(name: str, rows: list[dict[str, Any]]) -> Score:
    tokens = sum(row["tokens"] for row in rows)
    loss = math.fsum(row["loss"] for row in rows) / max(tokens, 1)
    return Score(
        name=name,
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        token_accuracy=sum(row["hits"] for row in rows) / max(tokens, 1),
        tokens=tokens,
        rows=rows,
    )

"""One question with its answers: base, tuned, or both in a blind comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gradio_app.chat.command import sees_images
from gradio_app.chat.prompts import HeldOutPrompt, extract_question, held_out_prompts, image_file
from gradio_app.chat.request import (
    Sampling,
    Turns,
    build_messages,
    user_turn,
    validate_sampling,
    validate_text,
)
from gradio_app.chat.sessions import AnswerChunk, ChatSessions
from gradio_app.chat.votes import SIDES, Ballot, shuffle_sides
from gradio_app.errors import UserError
from gradio_app.runs.types import Checkpoint, Run

MODES = ("both", "tuned", "base", "blind")
# Characters of a saved conversation.
MAX_ROW = 2_000_000


class Question(NamedTuple):
    """A text, and the paths of the images that it is about."""

    text: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """What was said in a tab so far; it stays on the server.

    Attributes:
        checkpoint: Whose answers the tuned ones are; ``None`` before that is chosen.
        other: The checkpoint that answers in place of the base; ``None`` for the base.
        blind: Whether it is hidden who is who.
        left: Turns of the left column: the base, or A.
        right: Turns of the right column: the tuned model, or B.
        ends: How the last answers ended, by column.
        reference: The answer in the data, where that is known.
        ballot: What can be voted on.
        row: The last question, if it is a row of the data.
    """

    checkpoint: Checkpoint | None = None
    other: Checkpoint | None = None
    blind: bool = False
    left: Turns = field(default_factory=list)
    right: Turns = field(default_factory=list)
    ends: Mapping[str, AnswerChunk] = field(default_factory=dict)
    reference: str = ""
    ballot: Ballot | None = None
    row: HeldOutPrompt | None = None


def without_last(talk: Conversation) -> tuple[Conversation, Question]:
    """Returns a conversation without its last question, and that question; none is empty."""
    known = {"left": talk.left, "right": talk.right}
    places = {
        name: [place for place, turn in enumerate(turns) if turn["role"] == "user"]
        for name, turns in known.items()
    }
    count, question = max(map(len, places.values())), Question()
    shorter: dict[str, Any] = {}
    # A column without the last question was stopped before it, or has no answers at all.
    for name, turns in known.items():
        if count and len(places[name]) == count:
            last = turns[places[name][-1]]
            question = Question(last["content"], tuple(last.get("images", ())))
            shorter[name] = turns[: places[name][-1]]
    return replace(talk, **shorter, ends={}, reference="", ballot=None, row=None), question


class ChatInputs(NamedTuple):
    """Values of the settings, in the order in which they are sent; a browser can send anything."""

    mode: Any
    checkpoint: Any
    system: Any
    temperature: Any
    top_p: Any
    max_new_tokens: Any
    seed: Any
    top_k: Any
    repetition: Any
    stop: Any
    other: Any = ""


@dataclass(frozen=True)
class ChatRequest:
    """A question with its settings, checked.

    Attributes:
        question: A text with its images, or a row of the data.
        mode: Who answers.
        checkpoint: Whose answers the tuned ones are.
        other: The checkpoint that answers in place of the base, if one does.
        system: System turn, or empty.
        sampling: How tokens are drawn.
    """

    question: Question | HeldOutPrompt
    mode: str
    checkpoint: Checkpoint
    system: str
    sampling: Sampling
    other: Checkpoint | None = None

    @property
    def names(self) -> list[str]:
        """Names of its checkpoints."""
        return [one.name for one in (self.checkpoint, self.other) if one is not None]


def parse_request(run: Run, question: Any, inputs: ChatInputs) -> ChatRequest:
    """Returns the validated question of a visitor: a text, a held-out row or the place of one.

    A text may come with images, as ``Question``, and is then allowed to be empty. Raises UserError
    if it cannot be asked.
    """
    rows = held_out_prompts(run)
    asked: Question | HeldOutPrompt
    if isinstance(question, HeldOutPrompt):
        asked = question
    elif isinstance(question, int):
        if not 0 <= question < len(rows):
            raise UserError("playground.refused_empty")
        asked = rows[question]
    else:
        text, images = question if isinstance(question, Question) else (question, ())
        if images and not sees_images(run):
            raise UserError("playground.refused_images", name=run.name)
        asked = Question(validate_text(text, "image" if images else "question"), images)
    # A row of the data is asked as it is there.
    if isinstance(asked, HeldOutPrompt) and asked.turns is not None:
        system = asked.system
    else:
        system = validate_text(inputs.system, "system")
    checkpoint, sampling = parse_settings(run, inputs)
    mode = inputs.mode if inputs.mode in MODES else "both"
    return ChatRequest(
        question=asked,
        mode=mode,
        checkpoint=checkpoint,
        system=system,
        sampling=sampling,
        # Votes are for the base or the tuned model.
        other=find_checkpoint(run, inputs.other) if inputs.other and mode != "blind" else None,
    )


def saved_row(talk: Conversation, system: Any) -> str:
    """Returns a conversation as a JSON line that ``SupervisedData`` trains on.

    It has the answers of the tuned model, and those of the base where that has answered alone.
    Raises UserError where nothing was answered, or images belong to it.
    """
    turns = talk.right or talk.left
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError("playground.refused_save")
    if any("images" in turn for turn in turns):
        raise UserError("playground.refused_save_images")
    messages = build_messages(validate_text(system, "system"), turns)
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def opened_row(file: Any) -> tuple[str, Conversation]:
    """Returns system prompt and conversation of the first row of a file of JSON lines.

    Raises UserError where it is none that can be continued.
    """
    try:
        with Path(str(file)).open(encoding="utf-8") as lines:
            messages = json.loads(lines.readline(MAX_ROW))["messages"]
        said = [(str(one["role"]), validate_text(one["content"])) for one in messages]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError("playground.refused_open") from None
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise UserError("playground.refused_open")
    turns = [{"role": role, "content": text} for role, text in said]
    build_messages(system, turns)
    return system, Conversation(left=turns, right=list(turns))


def parse_settings(run: Run, inputs: ChatInputs) -> tuple[Checkpoint, Sampling]:
    """Returns the checkpoint and how tokens are drawn.

    Raises UserError if the checkpoint does not exist, or a setting is out of range.
    """
    return find_checkpoint(run, inputs.checkpoint), validate_sampling(*inputs[3:10])


def find_checkpoint(run: Run, name: Any) -> Checkpoint:
    """Returns a checkpoint of a run, by default the first one.

    Raises UserError if it has none of that name.
    """
    found = next((one for one in run.checkpoints() if not name or one.name == name), None)
    if found is None:
        raise UserError("playground.refused_checkpoint", name=str(name)[:80])
    return found


def stream_answers(
    speakers: ChatSessions, run: Run, talk: Conversation, asked: ChatRequest
) -> Iterator[Conversation]:
    """Yields a conversation while it goes on. Raises UserError if the model cannot answer."""
    blind = asked.mode == "blind"
    before = [one and one.name for one in (talk.checkpoint, talk.other)]
    known = before == [asked.checkpoint.name, asked.other and asked.other.name]
    # A conversation that was opened is that of nobody yet.
    if blind or talk.blind or not (known or talk.checkpoint is None):
        # Answers that are judged must not lean on what one of them has said before.
        talk = Conversation(checkpoint=asked.checkpoint, other=asked.other, blind=blind)
    question, reference = _question(speakers, run, asked)
    if isinstance(asked.question, HeldOutPrompt) and asked.question.turns is not None:
        earlier = [
            {**turn, "images": list(map(image_file, turn["images"]))} if "images" in turn else turn
            for turn in asked.question.earlier
        ]
        talk = Conversation(asked.checkpoint, asked.other, blind, list(earlier), list(earlier))
    row = asked.question if isinstance(asked.question, HeldOutPrompt) else None
    talk = replace(talk, checkpoint=asked.checkpoint, other=asked.other)
    talk = replace(talk, reference=reference, row=row)
    talk = replace(talk, ends={}, ballot=None)
    who = shuffle_sides() if blind else dict(zip(SIDES, ("base", "tuned"), strict=True))
    columns = dict(zip(SIDES, ("left", "right"), strict=True))
    for side, name in who.items():
        if asked.mode in ("base", "tuned") and name != asked.mode:
            continue
        part = (columns[side], name, question)
        for now in _answer(speakers, run, talk, asked, part):
            yield now
        talk = now
        if talk.ends[columns[side]].stopped:
            return
    if blind:
        yield replace(talk, ballot=_ballot(run, talk, asked, who, question))


def _question(speakers: ChatSessions, run: Run, asked: ChatRequest) -> tuple[Question, str]:
    """Returns the question, and the answer in the data if it is one of its rows."""
    around = speakers.prompt_affixes(run.owner)
    if isinstance(asked.question, HeldOutPrompt):
        row = asked.question
        images = tuple(map(image_file, row.images))
        return Question(extract_question(row, around), images), row.reference
    for row in [] if asked.question.images else held_out_prompts(run):
        try:
            own = row.system.strip() == asked.system and not (row.earlier or row.images)
            same = row.turns is None or own
            if same and extract_question(row, around).strip() == asked.question.text:
                return asked.question, row.reference
        except UserError:
            continue
    return asked.question, ""


def _answer(
    speakers: ChatSessions,
    run: Run,
    talk: Conversation,
    asked: ChatRequest,
    part: tuple[str, str, Question],
) -> Iterator[Conversation]:
    column, name, question = part
    said = [*getattr(talk, column), user_turn(*question)]
    messages = build_messages(asked.system, said)
    turns: dict[str, Any] = {column: said}
    yield replace(talk, **turns)
    checkpoint = asked.other if name == "base" else asked.checkpoint
    chosen = None if checkpoint is None else checkpoint.name
    pieces = speakers.answer(run.owner, run, chosen, messages, asked.sampling)
    for piece in pieces:
        turns = {column: [*said, {"role": "assistant", "content": piece.text}]}
        ends = {**talk.ends, column: piece} if piece.done else talk.ends
        yield replace(talk, **turns, ends=ends)


def _ballot(
    run: Run, talk: Conversation, asked: ChatRequest, who: dict[str, str], question: Question
) -> Ballot:
    return Ballot(
        run_id=run.id,
        checkpoint=asked.checkpoint.name,
        prompt=question.text,
        images=len(question.images),
        who=who,
        answers={"a": talk.left[-1]["content"], "b": talk.right[-1]["content"]},
        settings={"system": asked.system, **asked.sampling.as_dict()},
    )

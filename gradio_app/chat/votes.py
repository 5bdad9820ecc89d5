"""Blind votes between answers, stored in ``votes.jsonl``."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from gradio_app.errors import UserError
from gradio_app.runs.files import read_rows
from gradio_app.runs.types import Run

FILE = "votes.jsonl"
SIDES = ("a", "b")
VOTES = (*SIDES, "tie", "both_bad")
OUTCOMES = ("tuned", "base", "tie", "both_bad")
# A public page must not fill the disk.
MAX_BYTES = 5_000_000
_lock = threading.Lock()


@dataclass(frozen=True)
class Ballot:
    """Two answers to a prompt whose sources are not revealed yet.

    ``who`` answers, ``"base"`` or ``"tuned"``, and ``answers`` are by side; ``settings`` are those
    of the sampling; ``images`` counts those of the prompt.
    """

    run_id: str
    checkpoint: str
    prompt: str
    who: Mapping[str, str]
    answers: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    images: int = 0


def shuffle_sides(chance: random.Random | None = None) -> dict[str, str]:
    """Returns who answers as A and who as B, by chance."""
    names = ["base", "tuned"]
    (chance or random.SystemRandom()).shuffle(names)
    return dict(zip(SIDES, names, strict=True))


def record_vote(run: Run, ballot: Ballot, vote: object) -> str:
    """Writes a vote down, unless there are too many; returns one of ``OUTCOMES``."""
    if vote not in VOTES or ballot.run_id != run.id or set(ballot.answers) != set(SIDES):
        raise UserError("playground.refused_vote")
    outcome = ballot.who.get(str(vote), str(vote))
    row = {
        "time": time.time(),
        "checkpoint": ballot.checkpoint,
        "prompt": ballot.prompt,
        "images": ballot.images,
        "answers": {ballot.who[side]: ballot.answers[side] for side in SIDES},
        "shown": dict(ballot.who),
        "settings": dict(ballot.settings),
        "vote": vote,
        "outcome": outcome,
    }
    with _lock:
        file = run.folder.path / FILE
        if file.is_file() and file.stat().st_size > MAX_BYTES:
            raise UserError("playground.refused_votes")
        run.folder.append(file, row)
    return outcome


def count_votes(run: Run, checkpoint: str) -> dict[str, int]:
    """Returns how often each outcome was voted for, for one checkpoint against the base."""
    counts = dict.fromkeys(OUTCOMES, 0)
    for row in read_rows(run.folder.path / FILE, 2 * MAX_BYTES):
        outcome = row.get("outcome")
        if row.get("checkpoint") == checkpoint and outcome in counts:
            counts[outcome] += 1
    return counts

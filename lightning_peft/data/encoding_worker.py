"""A process that encodes rows: reads pickles from its standard input and answers with others."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.processes import claim_standard_streams


@dataclass(frozen=True)
class Outcome:
    """The prepared rows of a sample, or why there are none, and its keys that nothing uses."""

    rows: Sequence[dict[str, Any]] = ()
    problems: Sequence[tuple[str, str]] = ()
    unused: Sequence[str] = ()


def outcome(encoder: RowEncoder, sample: Sample) -> Outcome:
    """Returns the outcome of a sample."""
    unused: Sequence[str] = ()
    rows: Sequence[dict[str, Any]] = ()
    problems: list[tuple[str, str]] = []
    try:
        unused = encoder.unused(sample)
    except EncodingProblem as problem:
        problems.append((problem.kind, str(problem)))
    try:
        rows = encoder.encode(sample)
    except EncodingProblem as problem:
        problems.append((problem.kind, str(problem)))
    # What cannot be rendered at all is found by both.
    problems = list(dict.fromkeys(problems))
    return Outcome(() if problems else rows, problems, unused)


def outcomes(encoder: RowEncoder, samples: Sequence[Sample]) -> list[Outcome]:
    """Returns the outcome of each sample."""
    return [outcome(encoder, sample) for sample in samples]


def main() -> None:
    """Answers until the input ends, as it does when the other process is gone."""
    # The parent process decides when to stop, and gets Ctrl-C from the terminal itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = claim_standard_streams()
    encoder: RowEncoder = pickle.load(requests)
    pickle.dump(None, answers)
    answers.flush()
    while True:
        try:
            samples = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(outcomes(encoder, samples), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

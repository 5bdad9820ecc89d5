"""A process that encodes rows: reads pickles from its standard input and answers with others."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Sequence
from typing import Any

from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.validation import EncodingProblem

# Prepared rows, or kind and text of why there are none.
Outcome = list[dict[str, Any]] | tuple[str, str]


def outcome(encoder: RowEncoder, sample: Sample) -> Outcome:
    """Returns what becomes of a sample."""
    try:
        return encoder.encode(sample)
    except EncodingProblem as problem:
        return problem.kind, str(problem)


def outcomes(encoder: RowEncoder, samples: Sequence[Sample]) -> list[Outcome]:
    """Returns what becomes of each."""
    return [outcome(encoder, sample) for sample in samples]


def main() -> None:
    """Answers until the input ends, as it does when the other process is gone."""
    # Who asks decides when it is over, and is told of Ctrl-C by the terminal itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may come between the answers.
    os.dup2(2, 1)
    encoder: RowEncoder = pickle.load(sys.stdin.buffer)
    pickle.dump(None, answers)
    answers.flush()
    while True:
        try:
            samples = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(outcomes(encoder, samples), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

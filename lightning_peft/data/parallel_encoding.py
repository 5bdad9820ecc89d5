"""Tokenization in several processes, in row order, through a ``DataLoader``.

It notices workers that die, and ends them with the pass over the rows.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_peft.compat.torch import notice_ended_workers, stop_workers
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import LightningPeftError

T = TypeVar("T")
# Elsewhere, system libraries do not survive a fork.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
# Rows that take about as long as starting processes: those that are spawned import transformers.
MIN_ROWS_FOR_WORKERS = {"fork": 512, "spawn": 4096}
# Rows that a process gets at once.
CHUNK = 64
MAX_WORKERS = 8
# A forked process can inherit a lock that another thread holds, and would wait for it forever; one
# that dies at a bad moment of this one can go unnoticed.
TIMEOUT_SECONDS = 120
# Of the processes. A tokenizer in each has threads enough, and a spawned one would first import
# from the current folder, which may be somebody's data.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}
# Two that start at the same time would put back what the other one set.
_starting = threading.Lock()


class WorkersFailed(Exception):
    """Rows could not be encoded in several processes; one may do it, or show the error."""


@dataclass(frozen=True)
class Outcome:
    """The prepared rows of a sample, or why there are none, and its keys that nothing uses."""

    rows: Sequence[dict[str, Any]] = ()
    problems: Sequence[tuple[str, str]] = ()
    unused: Sequence[str] = ()


def outcome(encoder: RowEncoder, sample: Sample | None) -> Outcome:
    """Returns the outcome of a sample; an empty one where there is none."""
    if sample is None:
        return Outcome()
    found: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for name, step in (("unused", encoder.unused), ("rows", encoder.encode)):
        try:
            found[name] = step(sample)
        except EncodingProblem as problem:
            problems.append((problem.kind, str(problem)))
    if problems:
        found["rows"] = ()
    # What cannot be rendered at all is found by both.
    return Outcome(**found, problems=list(dict.fromkeys(problems)))


class _Outcomes(Dataset[Outcome]):
    """The outcome of each sample, which is its own index."""

    def __init__(self, encoder: RowEncoder) -> None:
        self.encoder = encoder

    def __getitem__(self, sample: Sample | None) -> Outcome:
        return outcome(self.encoder, sample)


def encode_rows(
    encoder: RowEncoder,
    items: Iterable[T],
    sample_of: Callable[[T], Sample | None],
    processes: int,
) -> Generator[tuple[T, Outcome], None, None]:
    """Yields every item, in order, with the outcome of its sample; reads some chunks ahead."""

    def here(item: T) -> tuple[T, Outcome]:
        return item, outcome(encoder, sample_of(item))

    iterator = iter(items)
    yield from map(here, islice(iterator, MIN_ROWS_FOR_WORKERS[START_METHOD]))
    first = list(islice(iterator, 1))
    rest = chain(first, iterator)
    if not first or processes < 2 or not encoder.parallelizable:
        yield from map(here, rest)
        return
    waiting: deque[list[T]] = deque()

    def chunks() -> Iterator[list[Sample | None]]:
        while chunk := list(islice(rest, CHUNK)):
            waiting.append(chunk)
            yield [sample_of(item) for item in chunk]

    loader: Iterator[list[Outcome]] = iter(())
    try:
        notice_ended_workers()
        with _conditions_of_start():
            loader = iter(
                DataLoader(
                    _Outcomes(encoder),
                    batch_sampler=chunks(),
                    collate_fn=list,
                    num_workers=processes,
                    multiprocessing_context=START_METHOD,
                    worker_init_fn=_end_with_parent,
                    timeout=TIMEOUT_SECONDS,
                    # The seed of the processes would be drawn from the user's.
                    generator=torch.Generator(),
                )
            )
        for outcomes in loader:
            yield from zip(waiting.popleft(), outcomes, strict=True)
    except Exception as error:
        # torch puts the traceback of a process into the text of its error.
        if isinstance(error, LightningPeftError) and not str(error).startswith("Caught "):
            raise
        raise WorkersFailed(str(error)) from error
    finally:
        stop_workers(loader)


@contextmanager
def _conditions_of_start() -> Iterator[None]:
    """Keeps processes that start from using threads, and from running the user's script."""
    with _starting:
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        main = sys.modules["__main__"]
        os.environ.update(_ENVIRONMENT)
        if START_METHOD == "spawn":
            sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            with warnings.catch_warnings():
                # On what cannot be pickled, which is then encoded in this process.
                warnings.simplefilter("ignore")
                yield
        finally:
            sys.modules["__main__"] = main
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _end_with_parent(worker: int) -> None:
    """Ends a worker when its parent is gone; torch's first waits until somebody reads its rows."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()

"""Encodes many rows in several processes, in their order.

The processes are programs of their own that read pickles. A forked one would inherit the locks of
torch's and the tokenizer's threads, and one that ``multiprocessing`` spawns would run the user's
script once more. Where they cannot be had, or fail, rows are encoded in this process, with the same
result.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.samples import Sample
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.processes import claim_standard_streams

log = logging.getLogger(__name__)
T = TypeVar("T")
# So many rows take about as long as starting the processes, which import transformers.
MIN_ROWS_FOR_WORKERS = 4096
# Rows that go to a process at once, and how often: the next ones lie ready when it is done.
CHUNK, MAX_PENDING_CHUNKS = 128, 2
# The one that reads and writes encodes too, so this makes eight.
MAX_WORKERS = 7
# With the path of this process before the first import: `-m` would look into the current folder
# first, which may be somebody's data.
_START = """import sys
sys.path[:] = sys.argv[1].split("\\n")
from lightning_peft.data.parallel_encoding import main
main()"""


@dataclass(frozen=True)
class Outcome:
    """The prepared rows of a sample, or why there are none, and its keys that nothing uses."""

    rows: Sequence[dict[str, Any]] = ()
    problems: Sequence[tuple[str, str]] = ()
    unused: Sequence[str] = ()


def outcome(encoder: RowEncoder, sample: Sample) -> Outcome:
    """Returns the outcome of a sample."""
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


def encode_rows(
    encoder: RowEncoder, items: Iterable[T], sample_of: Callable[[T], Sample | None]
) -> Iterator[tuple[T, Outcome]]:
    """Yields every item, in order, with the outcome of its sample; reads some chunks ahead."""

    def here(item: T) -> tuple[T, Outcome]:
        sample = sample_of(item)
        return item, Outcome() if sample is None else outcome(encoder, sample)

    iterator = iter(items)
    yield from map(here, itertools.islice(iterator, MIN_ROWS_FOR_WORKERS))
    first = list(itertools.islice(iterator, 1))
    rest = itertools.chain(first, iterator)
    count = min(usable_cores() - 1, MAX_WORKERS)
    given = pickled(encoder) if first and count > 0 and encoder.parallelizable else None
    if given is None:
        yield from map(here, rest)
        return
    processes = [_Process(encoder, given) for _ in range(count)]
    waiting: deque[tuple[list[T], Future[list[Outcome]]]] = deque()
    try:
        while chunk := list(itertools.islice(rest, CHUNK)):
            samples = [sample for sample in map(sample_of, chunk) if sample is not None]
            free = [process for process in processes if process.has_capacity()]
            if free:
                requested = min(free, key=_Process.load).submit(samples)
            else:
                # All have enough to do, so this one takes part meanwhile.
                requested = Future()
                requested.set_result(outcomes(encoder, samples))
            waiting.append((chunk, requested))
            while waiting and (
                waiting[0][1].done() or len(waiting) > 2 * MAX_PENDING_CHUNKS * (count + 1)
            ):
                yield from _paired(*waiting.popleft(), sample_of)
        while waiting:
            yield from _paired(*waiting.popleft(), sample_of)
    finally:
        for process in processes:
            process.end()


def _paired(
    chunk: list[T], requested: Future[list[Outcome]], sample_of: Callable[[T], Sample | None]
) -> Iterator[tuple[T, Outcome]]:
    made = iter(requested.result())
    for item in chunk:
        yield item, Outcome() if sample_of(item) is None else next(made)


def usable_cores() -> int:
    """Returns on how many cores this process may run."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def pickled(encoder: RowEncoder) -> bytes | None:
    """Returns the encoder as bytes, or ``None`` where something in it cannot travel."""
    try:
        return pickle.dumps(encoder)
    except Exception as error:  # Whatever the classes of a tokenizer raise.
        log.debug("Rows are encoded in one process: %s", error)
        return None


class _Process:
    """A process that encodes, asked by a thread of its own.

    Args:
        encoder: What encodes here where the process fails.
        given: The same as bytes.
    """

    def __init__(self, encoder: RowEncoder, given: bytes) -> None:
        self.encoder = encoder
        self.thread = ThreadPoolExecutor(1, "encoding")
        self.requested: list[Future[list[Outcome]]] = []
        self.ready = self.ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, "\n".join(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self.thread.submit(self._start, given)

    def _start(self, given: bytes) -> None:
        try:
            self._ask(given)
            self.ready = True
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            log.debug("A process that encodes rows did not start: %s", error)

    def _ask(self, question: bytes) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(question)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)

    def load(self) -> int:
        """Returns how many chunks it has yet to answer."""
        self.requested = [future for future in self.requested if not future.done()]
        return len(self.requested)

    def has_capacity(self) -> bool:
        """Returns whether it is there, and has less to do than it may have at once."""
        return self.ready and self.load() < MAX_PENDING_CHUNKS

    def submit(self, samples: list[Sample]) -> Future[list[Outcome]]:
        """Returns the future outcomes of samples."""
        future = self.thread.submit(self._outcomes, samples)
        self.requested.append(future)
        return future

    def _outcomes(self, samples: list[Sample]) -> list[Outcome]:
        if self.ready:
            try:
                made: list[Outcome] = self._ask(pickle.dumps(samples, pickle.HIGHEST_PROTOCOL))
                return made
            except (OSError, EOFError, pickle.PickleError) as error:
                self.ready = False
                log.debug("A process that encodes rows ended: %s", error)
        # Also what fails there: it does so here again, and can be seen.
        return [] if self.ended else outcomes(self.encoder, samples)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.ended, self.ready = True, False
        self.process.kill()
        self.thread.shutdown(wait=True, cancel_futures=True)
        self.process.communicate()

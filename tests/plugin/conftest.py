"""What these tests get: no advice about toy runs, no waiting for the disk, what Lightning says."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_fixtures import (  # noqa: F401
    _no_flushing,
    _one_thread,
    _quiet_lightning,
    pytest_collection_modifyitems,
)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What Lightning's loggers say: both trees share one, which the last one imported names."""
    messages: list[str] = []
    handler = logging.Handler()
    seen: list[logging.LogRecord] = []

    def emit(record: logging.LogRecord) -> None:
        # It comes once from each of the loggers that are above each other.
        if not any(record is one for one in seen):
            seen.append(record)
            messages.append(record.getMessage())

    handler.emit = emit  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning")]
    below = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in [*loggers, *below]:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    yield messages
    for logger in [*loggers, *below]:
        logger.removeHandler(handler)


@pytest.fixture
def run_processes(program: Any, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Runs a script as so many ranks, and returns the findings of each.

    In long tests Lightning starts the others; by default they are forked, which takes less time,
    and have one order of their sets: that ranks agree in spite of it is shown by the long ones.
    """
    long = request.node.get_closest_marker("long") is not None

    def run(
        folder: Path, count: int, *cases: str, script: str = "two_sharded_processes.py"
    ) -> list[Any]:
        words = [str(folder), str(count), *cases]
        ranks = 0 if long else count
        program.run_script(folder, Path(__file__).with_name(script), *words, ranks=ranks)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]

    return run

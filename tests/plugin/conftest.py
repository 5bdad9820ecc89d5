"""What all tests of the plugin get: no advice about toy runs, and no waiting for the disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for package in ("pytorch_lightning", "lightning", "torch"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:::{package}"))


@pytest.fixture(autouse=True)
def _quiet_lightning() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What Lightning's loggers say: both trees share one, which the last one imported names."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning")]
    below = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for logger in [*loggers, *below]:
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    yield messages
    for logger in [*loggers, *below]:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes up to a second on a busy disk, and no test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other longer than tiny layers compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

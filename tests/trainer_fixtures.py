"""What all tests with a Trainer get: no advice about toy runs, and no waiting for the disk.

A `conftest.py` imports what it wants of it.
"""

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

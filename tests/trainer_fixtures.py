"""What all tests with a Trainer get: no advice about toy runs, and no waiting for the disk.

A `conftest.py` imports what it wants of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Arguments of a Trainer that says nothing.
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def small_module(lightning: Any, broken: int | None = None) -> Any:
    """Returns a LightningModule of the package ``lightning``; its step ``broken`` fails."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
            self.head = torch.nn.Linear(8, 1)

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.head(self.body(batch)) ** 2).mean()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if index == broken:
                raise RuntimeError("the disk is on fire")
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)

    return Module()


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

"""What a test needs to know of one LightningModule that a package on PyPI ships."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds.kind import Kind
from kinds.training import METHODS, check_training
from torch import nn

import lightning_peft
from lightning_peft import engine

# The output layer of torch's attention, which is not called and stays dense.
READ_PAST = nn.modules.linear.NonDynamicallyQuantizableLinear
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "published.md"


@dataclass(frozen=True)
class Published(Kind):
    """One LightningModule of another package, made and fed as that package does it.

    ``field`` is the name of the package and ``title`` that of the class.

    Attributes:
        feed: Makes the package's own loaders to train and to validate on.
        left: Linear layers that get no adapter: the heads.
        score: A scalar loss of a module and a batch.
    """

    feed: Callable[[], tuple[Any, Any]] = tuple
    left: frozenset[str] = frozenset()
    score: Callable[[Any, Any], torch.Tensor] = engine.default_step

    def loaders(self) -> tuple[Any, Any]:
        return self.feed()

    def data(self) -> list[Any]:
        return list(self.feed()[1])

    def loss(self, module: Any, batch: Any, index: int) -> torch.Tensor:
        return self.score(module, batch)

    def check_layers(self, adapted: set[str], quantized: set[str]) -> None:
        made = self.make()
        layers = {name: layer for name, layer in made.named_modules() if name in adapted}
        linear = {name for name, layer in made.named_modules() if isinstance(layer, nn.Linear)}
        if "target_modules" not in self.strategy:
            assert linear - adapted == self.left
            assert adapted <= linear or not linear & adapted
        dense = {n for n, layer in layers.items() if isinstance(layer, READ_PAST)}
        assert quantized in (set(), adapted - dense)


def published(package: str, title: str, **given: Any) -> Published:
    """Returns one entry, which verifies in full before the first step."""
    strategy = {"verify": "full", **given.pop("strategy", {})}
    name = given.pop("name", title)
    return Published(name, package, title, batches=list, strategy=strategy, **given)


def parametrized(modules: list[Published], refused: bool) -> Any:
    """Returns the decorator for a test of all modules, by ``entry`` and ``method``."""
    chosen = [
        pytest.param(entry, method, id=f"{entry.name}-{method}")
        for entry in modules
        for method in METHODS
        if (method in entry.refused) == refused
    ]
    return pytest.mark.parametrize(("entry", "method"), chosen)


def train(entry: Published, method: str, folder: Path) -> None:
    """Trains one module, asserts all that ``tests/kinds`` does, and verifies it."""
    module = check_training(entry, method, folder)
    checks = lightning_peft.verify(module, entry.data()[0], entry.score).checks
    assert [check for check in checks if check.passed is False] == []
    unsure = {check.name for check in checks if check.passed is None}
    allowed = {"no effect before training"}
    if method == "lora":
        allowed.add("gradients pass through every quantized layer after an evaluation pass")
    assert unsure <= allowed


def rows(modules: Iterable[Published], version: str) -> list[str]:
    """Returns the lines of the table in the documentation."""
    return [
        f"| {entry.field} | {version} | `{entry.title}` "
        f"| {'refused' if 'lora' in entry.refused else 'trains'} "
        f"| {'refused' if 'qlora' in entry.refused else 'trains'} | {entry.note} |"
        for entry in modules
    ]


def pinned(package: str) -> str:
    """Returns the version in ``constraints.txt``, which is the one that is tested."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{package}==")]
    return line.partition(";")[0].partition("==")[2].strip()


def check_page(package: str, modules: list[Published]) -> None:
    """Compares the table in the documentation with the tests."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.startswith(f"| {package} |")]
    assert shown == rows(modules, pinned(package))

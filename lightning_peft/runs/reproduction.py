"""Comparison of two runs of one recipe, by metrics and bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.errors import ConfigError
from lightning_peft.runs.folder import RunFolder

# What decides the last bits of a floating-point sum.
_DECIDES_BITS = ("system", "processor", "cpu_capability", "threads", "gpus")
# How far metrics may be apart where they cannot be bit-for-bit identical.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Reproduction:
    """How a second run of a recipe compares with the first."""

    # Logged training steps that both have.
    steps: int
    # The largest at one step, and of one weight of the recommended adapter.
    loss_difference: float
    adapter_difference: float
    # After training: name to `(then, now)`.
    metrics: dict[str, tuple[float, float]]
    # Losses, metrics and weights, bit for bit.
    identical: bool
    # What was different about the machine and the versions: name to `(then, now)`.
    other: dict[str, tuple[Any, Any]]

    @property
    def passed(self) -> bool:
        """Whether the run was reproduced: bit for bit where possible, else within 1 %."""
        if self.identical:
            return True
        close = all(
            abs(now - then) <= TOLERANCE * max(abs(then), 1e-8)
            for then, now in self.metrics.values()
        )
        return bool(self.other) and close


def finished_result(run: RunFolder) -> dict[str, Any]:
    """Returns the result of a finished fit."""
    kind = "a folder without result.json"
    if run.result.is_file() and run.recipe.is_file():
        result: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
        if result["kind"] == "fit":
            return result
        kind = f"a run of {result['kind']}"
    raise ConfigError(
        f"{str(run.path)!r} cannot be run again and compared: it is {kind}. Name the folder of a "
        "fit that was finished; `fit --resume` finishes one that was stopped."
    )


def compare(first: RunFolder, second: RunFolder) -> Reproduction:
    """Compares two finished runs of one recipe."""
    results = [finished_result(run) for run in (first, second)]
    losses = [
        {row["step"]: row["train_loss"] for row in run.rows(run.metrics) if "train_loss" in row}
        for run in (first, second)
    ]
    shared = sorted(set(losses[0]) & set(losses[1]))
    apart = max((abs(losses[0][step] - losses[1][step]) for step in shared), default=0.0)
    then, now = (result["after"] for result in results)
    metrics = {name: (then[name], now[name]) for name in then if name in now}
    weights = _adapter_difference(first, second)
    same = losses[0] == losses[1] and then == now and weights == 0
    return Reproduction(len(shared), apart, weights, metrics, same, _other(*results))


def _adapter_difference(first: RunFolder, second: RunFolder) -> float:
    names = [
        file.parent.relative_to(first.checkpoints)
        for file in sorted(first.checkpoints.rglob("adapter_config.json"))
    ]
    largest = 0.0
    for name in names:
        if not (second.checkpoints / name).is_dir():
            return float("inf")
        tensors = [engine.read_adapter(run.checkpoints / name)[1] for run in (first, second)]
        if tensors[0].keys() != tensors[1].keys():
            return float("inf")
        for key, tensor in tensors[0].items():
            difference = (tensor.double() - tensors[1][key].double()).abs().max()
            largest = max(largest, float(difference) if tensor.numel() else 0.0)
            if not torch.equal(tensor, tensors[1][key]) and largest == 0:
                return float("nan")
    return largest


def _other(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    machines = [result["hardware"] for result in (first, second)]
    differing = {name: (machines[0][name], machines[1][name]) for name in _DECIDES_BITS}
    versions = [result["versions"] for result in (first, second)]
    differing |= {
        name: (versions[0].get(name), versions[1].get(name))
        for name in {**versions[0], **versions[1]}
    }
    return {name: (a, b) for name, (a, b) in differing.items() if a != b}

"""Explanations of out-of-memory errors, predicted or raised."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_peft.errors import itemize
from lightning_peft.plan.device_memory import DeviceMemory, readable
from lightning_peft.plan.prediction import PARTS, Prediction
from lightning_peft.plan.suggestions import Change

NAMES = {
    "weights_quantized": "quantized weights",
    "weights_dense": "other weights and buffers",
    "gathered": "weights gathered to compute with",
    "adapters": "adapters",
    "gradients": "gradients",
    "gradient_buckets": "buckets in which gradients are averaged",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits and their gradients",
    "dequantization": "dequantized weights",
    "overhead": "libraries and device context",
    "kernels": "compiled kernels of 16-bit products",
    "heap": "freed blocks that the process keeps",
}


def breakdown_lines(plan: Prediction) -> list[str]:
    """Returns the breakdown of peak memory, the largest first."""
    parts = sorted(PARTS, key=lambda part: -plan.breakdown[part])
    return [
        f"{NAMES[part]}: {readable(plan.breakdown[part])}" for part in parts if plan.breakdown[part]
    ]


def memory_warning(
    plan: Prediction, device: DeviceMemory, changes: Sequence[Change] = ()
) -> str | None:
    """Returns the warning before a run starts, or ``None`` where it should fit."""
    if plan.fits(device.bytes):
        return None
    sure = plan.low_bytes > device.bytes
    return (
        f"This run {'will' if sure else 'may'} not fit: it is expected to take "
        f"{readable(plan.peak_bytes)} (between {readable(plan.low_bytes)} and "
        f"{readable(plan.high_bytes)}), and {device.name} has {readable(device.bytes)}. At the "
        f"fullest moment there are:{itemize(breakdown_lines(plan))}" + _remedies(changes, device)
    )


def out_of_memory_message(plan: Prediction, device: DeviceMemory, changes: Sequence[Change]) -> str:
    """Returns the use of memory when it ran out, and changes that would make the run fit."""
    return (
        f"Out of memory on {device.name} ({readable(device.bytes)}). The run is expected to take "
        f"{readable(plan.peak_bytes)}, at the fullest moment:{itemize(breakdown_lines(plan))}"
        + _remedies(changes, device)
    )


def _remedies(changes: Sequence[Change], device: DeviceMemory) -> str:
    if not changes:
        return "\nNo single change of the settings saves memory; take a larger device."
    return "\nWhat helps:" + itemize(change.line(device.bytes) for change in changes)

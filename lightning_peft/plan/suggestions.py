"""Suggested changes that save memory, and explanations of out-of-memory errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_peft.errors import LightningPeftError, itemize
from lightning_peft.plan.device_memory import DeviceMemory, readable
from lightning_peft.plan.prediction import PARTS, Prediction, predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import ModelSource
from lightning_peft.plan.trace import Step

_SHORTEST = 32
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


@dataclass(frozen=True)
class Change:
    """One change to a run, in words, and the run after it."""

    words: str
    settings: PlanSettings
    # Predicted bytes that it saves.
    saved: int
    # The upper end of what the run takes after it.
    needed: int

    def line(self, device_bytes: int) -> str:
        """Returns the change as a sentence."""
        enough = "then it fits" if self.needed <= device_bytes else "not enough alone"
        return f"{self.words}: saves about {readable(self.saved)}, {enough}"


def suggest_changes(
    source: ModelSource,
    plan: Prediction,
    device_bytes: int,
    step: Step | None = None,
    count: int = 3,
) -> list[Change]:
    """Returns the changes that help most: those that fit come first, in the order of their cost.

    What costs least is first: checkpointing, then a smaller batch with more accumulation, which
    train the same; then a 4-bit base; then shorter sequences, which lose data. Of one kind of
    change it is the smallest that fits, else the largest.
    """
    kinds = _kinds(source, plan.settings)
    helpful = [
        change
        for kind in kinds
        if (change := _of_kind(kind, source, plan, device_bytes, step)) and change.saved > 0
    ]
    fitting = [change for change in helpful if change.needed <= device_bytes]
    rest = sorted((c for c in helpful if c not in fitting), key=lambda change: -change.saved)
    return [*fitting, *rest][:count]


def _of_kind(
    kind: list[tuple[str, PlanSettings]],
    source: ModelSource,
    plan: Prediction,
    device_bytes: int,
    step: Step | None,
) -> Change | None:
    change = None
    for words, settings in kind:
        try:
            after = predict(source, settings, step)
        except LightningPeftError:
            # Such as checkpointing in a module where nothing repeats.
            break
        saved = plan.peak_bytes - after.peak_bytes
        change = Change(words, settings, saved, after.high_bytes)
        if change.needed <= device_bytes:
            break
    return change


def _kinds(source: ModelSource, run: PlanSettings) -> list[list[tuple[str, PlanSettings]]]:
    """Returns the possible changes, of each kind from the smallest to the largest."""
    kinds: list[list[tuple[str, PlanSettings]]] = []
    if not run.checkpointing:
        on = replace(run, gradient_checkpointing=True)
        kinds.append([("gradient_checkpointing=True", on)])
    if source.rows_change and run.batch_size > 1:
        kinds.append([_smaller(run, rows) for rows in _halves(run.batch_size, 1)])
    if run.method == "full":
        kinds.append([("LoRA instead of training all weights", replace(run, method="lora"))])
    if run.method != "qlora":
        kinds.append([("QLoRA (a 4-bit base)", replace(run, method="qlora"))])
    if not run.optimizer_name.endswith("8bit"):
        small = replace(run, optimizer="paged_adamw_8bit")
        kinds.append([("optimizer='paged_adamw_8bit'", small)])
    if source.length_changes and run.seq_len >= 2 * _SHORTEST:
        lengths = _halves(run.seq_len, _SHORTEST)
        kinds.append([(f"sequences of {n} tokens", replace(run, seq_len=n)) for n in lengths])
    return kinds


def _halves(size: int, least: int) -> list[int]:
    """Returns a half, a quarter and the least, as far as they differ."""
    return list(dict.fromkeys(max(least, part) for part in (size // 2, size // 4, least)))


def _smaller(run: PlanSettings, rows: int) -> tuple[str, PlanSettings]:
    times = -(-run.batch_size // rows) * run.accumulate
    words = f"batch_size={rows} with accumulate_grad_batches={times}"
    return words, replace(run, batch_size=rows, accumulate=times)


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

"""Predicted memory of a training run, by category, with margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.plan import margins
from lightning_peft.plan.memory_tracker import ACTIVATIONS, DEQUANTIZATION, LOGITS
from lightning_peft.plan.processes import BUCKETS, GATHERED
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import ModelSource, from_config, from_module, from_name, rows_of
from lightning_peft.plan.trace import (
    ADAPTERS,
    DENSE,
    GRADIENTS,
    OPTIMIZER,
    QUANTIZED,
    Step,
    Trace,
    trace,
)

# What the process of a run holds besides tensors: libraries, compiled kernels, freed blocks.
OVERHEAD, KERNELS, HEAP = "overhead", "kernels", "heap"
PROCESS = (OVERHEAD, KERNELS, HEAP)
# The order in which a breakdown is shown.
PARTS = (
    QUANTIZED, DENSE, GATHERED, ADAPTERS, GRADIENTS, BUCKETS, OPTIMIZER, ACTIVATIONS, LOGITS,
    DEQUANTIZATION, OVERHEAD, KERNELS, HEAP,
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The memory of one run.

    Attributes:
        settings: The run.
        trace: What its second step holds.
        breakdown: Bytes at the fullest moment by part; they add up to :attr:`peak_bytes`. What
            is not in memory at that moment is zero.
    """

    settings: PlanSettings
    trace: Trace
    breakdown: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """What the run is expected to take at its fullest moment."""
        return sum(self.breakdown.values())

    @property
    def allocated(self) -> int:
        """Bytes of tensors alone: what torch's allocator hands out."""
        return sum(size for part, size in self.breakdown.items() if part not in PROCESS)

    @property
    def low_bytes(self) -> int:
        """The lower end of the interval, with paged optimizer states on the CPU."""
        over = margins.OVER[self.settings.device]
        return round((self.allocated - self.trace.paged) / (1 + over)) + self._besides(0)

    @property
    def high_bytes(self) -> int:
        """The upper end of the interval, which has to fit."""
        under = margins.UNDER[self.settings.device]
        return round(self.allocated / (1 - under)) + self._besides(2)

    def _besides(self, end: int) -> int:
        return sum(process_bytes(self.trace, self.settings.device, end).values())

    def fits(self, device_bytes: int) -> bool:
        """Returns whether even the upper end of the interval fits."""
        return self.high_bytes <= device_bytes

    def fits_comfortably(self, device_bytes: int) -> bool:
        """Returns whether it fits with room to spare."""
        return self.high_bytes <= margins.COMFORTABLE * device_bytes

    def verdict(self, device_bytes: int) -> str:
        """Returns ``"fits"``, ``"may not fit"`` or ``"does not fit"`` (not even the lower end)."""
        if self.fits(device_bytes):
            return "fits"
        return "may not fit" if self.low_bytes <= device_bytes else "does not fit"


def process_bytes(traced: Trace, device: str, end: int = 1) -> dict[str, int]:
    """Returns the bytes of the process by purpose: the least (0), the usual (1) or the most (2).

    The kernels are those of one length of batches at least, and as many as are kept at most; how
    many lengths there are is only known when a run is over. On CUDA only the overhead is counted.
    """
    found = {OVERHEAD: margins.PROCESS_BYTES[device][end], KERNELS: 0, HEAP: 0}
    if device == "cpu":
        most = margins.KERNELS_KEPT if traced.products else 0
        kept = (min(traced.products, most), most // 2, most)[end]
        moving = sum(traced.at_peak.get(one, 0) for one in (ACTIVATIONS, LOGITS, DEQUANTIZATION))
        found[KERNELS] = kept * margins.KERNEL_BYTES
        found[HEAP] = round(moving * margins.HEAP[end])
    return found


def predict(source: ModelSource, settings: PlanSettings, step: Step | None = None) -> Prediction:
    """Predicts the memory of one run."""
    traced = trace(
        source.build_meta_copy(),
        lambda: source.batch(settings.batch_size, settings.seq_len, settings.is_padded),
        settings,
        step or source.step,
        source.vocabulary,
    )
    fullest = max(traced.at_peak, traced.at_start, key=lambda held: sum(held.values()))
    breakdown = {part: fullest.get(part, 0) for part in PARTS}
    breakdown |= process_bytes(traced, settings.device)
    return Prediction(settings, traced, breakdown)


def plan_memory(
    model: Any,
    batch: Any = None,
    *,
    step: Step | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    **settings: Any,
) -> Prediction:
    """Predicts how much memory training ``model`` takes, without loading or allocating it.

    A copy without values goes through the real injection, forward and backward pass, and every
    tensor is counted from when it is made until it is let go.

    Args:
        model: A hub name or a folder with a ``config.json``, a transformers config, or any
            ``nn.Module``, such as a LightningModule. It is not changed.
        batch: For a module, a sample batch; only shapes and dtypes matter. For transformers models
            one is made from ``batch_size`` and ``seq_len``. Of a sample, ``batch_size`` changes the
            number of rows.
        step: Returns a scalar loss of a module on a batch. By default ``training_step``, else the
            ``loss`` of what the module returns.
        dtype: Dtype of the weights, for names and configs.
        revision: Branch, tag or commit, for names.
        **settings: The fields of :class:`lightning_peft.plan.settings.PlanSettings`: ``method``,
            ``batch_size``, ``seq_len``, ``gradient_checkpointing``, ``precision``, ``optimizer``,
            ``lora``, ...

    Returns:
        The prediction: ``peak_bytes``, ``breakdown``, ``low_bytes`` and ``high_bytes``.

    Raises:
        ConfigError: If the settings cannot work, or the config cannot be read.
        UnsupportedError: If the forward pass cannot be traced without values.
    """
    rows = None if batch is None else rows_of(batch)
    chosen = PlanSettings(**({} if rows is None else {"batch_size": rows}) | settings)
    return predict(source_of(model, batch, dtype, revision), chosen, step)


def source_of(
    model: Any, batch: Any = None, dtype: str = "auto", revision: str | None = None
) -> ModelSource:
    """Returns the source for whatever :func:`plan_memory` takes as ``model``."""
    if isinstance(model, nn.Module):
        return from_module(model, batch)
    if hasattr(model, "get_text_config"):
        return from_config(model, dtype=dtype)
    return from_name(str(model), revision, dtype)

"""Complete plan of a model: requested run, other methods, limits and recommended method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_peft.errors import UnsupportedError
from lightning_peft.plan.cluster import Cluster, StepBounds, step_bounds
from lightning_peft.plan.device_memory import DeviceMemory, readable
from lightning_peft.plan.memory_tracker import ACTIVATIONS, LOGITS
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.settings import METHODS, Method, PlanSettings
from lightning_peft.plan.sources import ModelSource

# Where the search ends, and how fine it is for sequences.
_LARGEST_BATCH, _LONGEST, _STEP = 4096, 1 << 20, 64
_LARGE = 13_000_000_000


@dataclass(frozen=True)
class MethodComparison:
    """The answers about one run."""

    model: str
    plan: Prediction
    device: DeviceMemory | None
    # The same run with each method that can be run so.
    methods: dict[Method, Prediction]
    # Bytes of activations and logits that are kept for the backward pass, by whether blocks are
    # checkpointed; without an entry where that cannot be done.
    kept: dict[bool, int]
    # The most rows that fit at the run's length, and the longest sequence at its batch size, if
    # they were searched.
    batch_size: int | None
    seq_len: int | None
    recommendation: Recommendation
    # Sequence that the model was made for, if its config says so.
    longest: int | None = None
    # "chunked" if they are those of some tokens at a time, else "all".
    logits: str = "all"
    # Whether the most rows and the longest sequence are with blocks checkpointed.
    limits_checkpointing: bool = False
    cluster: Cluster | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the run fits; ``None`` without a device."""
        return None if self.device is None else self.plan.fits(self.device.bytes)

    @property
    def bounds(self) -> StepBounds | None:
        """What bounds a step in several processes, where their speed is known."""
        if self.cluster is None or self.plan.settings.processes == 1:
            return None
        return step_bounds(self.plan.trace.work, self.cluster)

    def as_dict(self) -> dict[str, Any]:
        """Returns the answers as primitives."""
        run, plan, device = self.plan.settings, self.plan, self.device
        return {
            "model": self.model,
            "run": {
                "method": run.method,
                "batch_size": run.batch_size,
                "seq_len": run.seq_len,
                "accumulate": run.accumulate,
                "precision": run.precision,
                "optimizer": run.optimizer_name,
                "gradient_checkpointing": run.checkpointing,
                "lora": dict(run.lora),
                "logits": self.logits,
            },
            "trainable_parameters": plan.trace.trainable,
            "total_parameters": plan.trace.total,
            **_bytes(plan),
            "breakdown": plan.breakdown,
            "paged_optimizer_bytes": plan.trace.paged,
            "kept_for_backward": {
                "with_checkpointing": self.kept.get(True),
                "without_checkpointing": self.kept.get(False),
            },
            "processes": self._processes(),
            "device": None if device is None else {"name": device.name, "bytes": device.bytes},
            "fits": self.fits,
            "largest_batch_size": self.batch_size,
            "longest_seq_len": self.seq_len,
            "methods": {
                method: {
                    "trainable_parameters": other.trace.trainable,
                    **_bytes(other),
                    "breakdown": other.breakdown,
                    "fits": None if device is None else other.fits(device.bytes),
                }
                for method, other in self.methods.items()
            },
            "recommended_method": self.recommendation.method,
            "recommendation": self.recommendation.text,
        }

    def _processes(self) -> dict[str, Any] | None:
        work, run = self.plan.trace.work, self.plan.settings
        if self.cluster is None or run.processes == 1:
            return None
        bounds = self.bounds
        return {
            **asdict(self.cluster),
            "sharding": run.sharding if run.is_sharded else None,
            **{f"{name}_in_a_step": value for name, value in asdict(work).items()},
            "sent_in_a_step": work.sent(run.processes),
            "least_seconds": None if bounds is None else asdict(bounds),
            "bound": None if bounds is None else bounds.bound,
        }


def _bytes(plan: Prediction) -> dict[str, int]:
    return {
        "peak_bytes": plan.peak_bytes,
        "low_bytes": plan.low_bytes,
        "high_bytes": plan.high_bytes,
    }


def compare_methods(
    source: ModelSource,
    settings: PlanSettings,
    device: DeviceMemory | None = None,
    *,
    limits: bool = True,
    progress: Callable[[str], None] = lambda doing: None,
) -> MethodComparison:
    """Predicts a run, the same run by the other methods, and how far it could grow.

    ``limits`` takes most of the time; ``progress`` takes the name of the next prediction.
    """
    runs = f"at batch_size={settings.batch_size}, seq_len={settings.seq_len}"
    progress(f"{settings.method} {runs}")
    known = _by_checkpointing(source, settings, device)
    plan = known[list(known)[-1]]
    # A run that decides for itself grows further with them checkpointed.
    automatic, settings = settings.gradient_checkpointing == "auto", plan.settings
    methods = {settings.method: plan}
    for method in METHODS:
        if method not in methods:
            progress(f"{method} {runs}")
            methods |= _by(method, source, settings)
    other = not settings.checkpointing
    progress(f"gradient_checkpointing={other}")
    with suppress(UnsupportedError):
        if other not in known:
            known[other] = predict(source, replace(settings, gradient_checkpointing=other))
    saved = {on: one.trace.kept for on, one in known.items()}
    batch_size = seq_len = None
    grown = known.get(True, plan) if automatic else plan
    if device is not None and limits:
        if source.rows_change:
            progress("the largest batch that fits")
            batch_size = largest_batch(source, grown, device.bytes)
        if source.length_changes:
            progress("the longest sequence that fits")
            seq_len = longest_sequence(source, grown, device.bytes)
    return MethodComparison(
        source.name,
        plan,
        device,
        {method: methods[method] for method in METHODS if method in methods},
        saved,
        batch_size,
        seq_len,
        recommend(methods, device),
        source.longest,
        "all" if source.step is None else "chunked",
        grown.settings.checkpointing,
    )


def _by_checkpointing(
    source: ModelSource, settings: PlanSettings, device: DeviceMemory | None
) -> dict[bool, Prediction]:
    """Returns predictions by whether blocks are checkpointed; the last one is of the run."""
    automatic = settings.gradient_checkpointing == "auto" and settings.method != "full"
    # A run that shares its base has them checkpointed.
    if not automatic or device is None or settings.is_sharded:
        return {settings.checkpointing: predict(source, settings)}
    found = {False: predict(source, replace(settings, gradient_checkpointing=False))}
    if not found[False].fits_comfortably(device.bytes):
        with suppress(UnsupportedError):
            found[True] = predict(source, replace(settings, gradient_checkpointing=True))
    return found


def _by(method: Method, source: ModelSource, settings: PlanSettings) -> dict[Method, Prediction]:
    """Predicts the run with another method and, where it was left open, that method's optimizer.

    Checkpointing is that of the run asked for, so that the methods are compared and nothing else.
    Nothing is returned where the base can be shared by one method and not by this one.
    """
    run = replace(settings, method=method, gradient_checkpointing=settings.checkpointing)
    try:
        return {method: predict(source, run)}
    except UnsupportedError:
        if not run.is_sharded:
            raise
        return {}


def largest_batch(source: ModelSource, plan: Prediction, device_bytes: int) -> int:
    """Returns the most rows that fit at the sequence length of a run; 0 where none do."""

    def needed(rows: int) -> int:
        return predict(source, replace(plan.settings, batch_size=rows)).high_bytes

    known = {plan.settings.batch_size: plan.high_bytes}
    return _largest(needed, known, device_bytes, _LARGEST_BATCH)


def longest_sequence(source: ModelSource, plan: Prediction, device_bytes: int) -> int:
    """Returns the longest sequence that fits at the batch size of a run; 0 where none does.

    In steps of 64 tokens, and at most as long as the model was made for.
    """
    limit = source.longest or _LONGEST
    step = min(_STEP, limit)

    def needed(count: int) -> int:
        return predict(source, replace(plan.settings, seq_len=count * step)).high_bytes

    known = {}
    if plan.settings.seq_len % step == 0 and plan.settings.seq_len <= limit:
        known = {plan.settings.seq_len // step: plan.high_bytes}
    return step * _largest(needed, known, device_bytes, limit // step)


def _largest(
    needed: Callable[[int], int], known: dict[int, int], device_bytes: int, most: int
) -> int:
    """Returns the largest count up to ``most`` whose need, which is convex, fits; 0 where none."""
    known = {count: size for count, size in known.items() if count <= most}
    if not known:
        known[1] = needed(1)
    if 1 not in known and min(known.values()) > device_bytes:
        known[1] = needed(1)
    if len(known) == 1:
        other = min(most, 2 * max(known))
        known[other] = needed(other)
    nearby = True
    while True:
        low, high = _bounds(known, device_bytes, most)
        if high - low <= 1:
            return low
        # Where memory grows evenly the answer is at one of the bounds, else between them.
        edge = high - 1 if max(known.values()) <= device_bytes else low + 1
        count = edge if nearby else (low + high) // 2
        nearby = not nearby
        known[count] = needed(count)


def _bounds(known: dict[int, int], device_bytes: int, most: int) -> tuple[int, int]:
    """Returns a count that fits for sure (0 for none), and one that does not."""
    fitting = sorted(count for count, size in known.items() if size <= device_bytes)
    failing = [count for count in known if count not in fitting]
    low, high = max(fitting, default=0), min(failing, default=most + 1)
    if fitting and failing:
        # Between the two, the need is at most the line.
        slope = (known[high] - known[low]) / (high - low)
        inside = low + int((device_bytes - known[low]) / slope)
        low, last = min(max(low, inside), high - 1), low
    else:
        last = low
    if len(fitting) > 1:
        # Beyond the two, it is at least the line.
        before = fitting[-2]
        slope = (known[last] - known[before]) / (last - before)
        if slope > 0:
            high = min(high, last + int((device_bytes - known[last]) / slope) + 1)
    return low, high


@dataclass(frozen=True)
class Recommendation:
    """What to do."""

    method: Method | None
    text: str


def recommend(plans: Mapping[Method, Prediction], device: DeviceMemory | None) -> Recommendation:
    """Recommends a method."""
    refused = [method for method in METHODS if method not in plans]
    if refused:
        first = next(method for method in reversed(METHODS) if method in plans)
        text = f"{first}: a run with {' or '.join(refused)} cannot share the base of this model."
        return Recommendation(first, text)
    lora, qlora = plans["lora"], plans["qlora"]
    large = _weights(lora) > _LARGE
    if device is None:
        saved = 1 - qlora.peak_bytes / lora.peak_bytes
        best: Method = "qlora" if large else "lora"
        return Recommendation(
            best,
            f"LoRA needs about {_range(lora)} and QLoRA about {_range(qlora)} ({saved:.0%} less). "
            "Where the first fits comfortably, LoRA is simpler and its steps are faster, since "
            "nothing is dequantized; else take QLoRA. Give --gpu for an answer for your device.",
        )
    comfortable = lora.fits_comfortably(device.bytes)
    if comfortable and not large:
        return Recommendation("lora", _lora(plans, device))
    if qlora.fits(device.bytes):
        return Recommendation("qlora", _qlora(lora, qlora, device, large))
    return Recommendation(None, _nothing(plans, device))


def _weights(plan: Prediction) -> int:
    return plan.trace.total - plan.trace.trainable


def _range(plan: Prediction) -> str:
    return f"{readable(plan.peak_bytes)} (up to {readable(plan.high_bytes)})"


def _lora(plans: Mapping[Method, Prediction], device: DeviceMemory) -> str:
    lora, full = plans["lora"], plans["full"]
    text = (
        f"LoRA: with the base as it is, the run takes about {_range(lora)} of the "
        f"{readable(device.bytes)} of {device.name}, which is comfortable. It is simpler than "
        f"QLoRA, and its steps are faster, since nothing is dequantized."
    )
    if full.fits_comfortably(device.bytes):
        text += f" Training all weights would fit too, with about {_range(full)}."
    return text + _usual_reason(lora)


def _qlora(lora: Prediction, qlora: Prediction, device: DeviceMemory, large: bool) -> str:
    if lora.fits(device.bytes):
        why = (
            f"above about {_LARGE / 1e9:.0f} billion weights the room is better spent on batch "
            "and length"
            if large
            else "LoRA would leave little room"
        )
        other = f"{why}: it needs about {_range(lora)} of the {readable(device.bytes)}"
    else:
        other = (
            f"LoRA {lora.verdict(device.bytes)} into the {readable(device.bytes)} of "
            f"{device.name}: it needs about {_range(lora)}"
        )
    return f"QLoRA: {other}, and QLoRA about {_range(qlora)}.{_usual_reason(qlora)}"


def _nothing(plans: Mapping[Method, Prediction], device: DeviceMemory) -> str:
    least = min(plans.values(), key=lambda plan: plan.high_bytes)
    return (
        f"None of the methods fits into the {readable(device.bytes)} of {device.name}; the least "
        f"is {least.settings.method} with about {_range(least)}. Shorten the sequence, make the "
        "batch smaller (and accumulate more of them), switch gradient checkpointing on, or take a "
        f"larger device.{_usual_reason(least)}"
    )


def _usual_reason(plan: Prediction) -> str:
    """Context and batch, not weights, are the usual reason why a run that should fit does not."""
    moving = plan.breakdown[ACTIVATIONS] + plan.breakdown[LOGITS]
    share = moving / plan.peak_bytes
    if share < 0.3:
        return ""
    return (
        f" {share:.0%} of that is activations and logits, which grow with batch_size="
        f"{plan.settings.batch_size} and seq_len={plan.settings.seq_len}."
    )

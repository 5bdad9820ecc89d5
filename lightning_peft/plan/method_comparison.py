"""Complete plan of a model: requested run, other methods and limits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_peft.errors import UnsupportedError
from lightning_peft.plan.cluster import Cluster, StepBounds, step_bounds
from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plan.limits import largest_batch, longest_sequence
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.recommendation import Recommendation, recommend
from lightning_peft.plan.settings import METHODS, Method, PlanSettings
from lightning_peft.plan.sources import ModelSource


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

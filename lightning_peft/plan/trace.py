"""Traced training step of a meta copy.

The order is Lightning's: forward, then the old gradients are dropped, then backward, then the step.
A second step is what is traced, so that the optimizer's states exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.compat.transformers import enable_gradient_checkpointing
from lightning_peft.engine.verification.probe import NoLossError, preserved_randomness
from lightning_peft.errors import ConfigError, LightningPeftError, UnsupportedError
from lightning_peft.plan.memory_tracker import MemoryTracker
from lightning_peft.plan.meta_copy import fake_mode, make_fake
from lightning_peft.plan.processes import BUCKETS, Gathered, share_weights
from lightning_peft.plan.settings import PlanSettings, paged_bytes, state_bytes, step_bytes
from lightning_peft.plan.work import Work, WorkCounter

Step = Callable[[nn.Module, Any], Tensor]

QUANTIZED, DENSE, ADAPTERS = "weights_quantized", "weights_dense", "adapters"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"


@dataclass(frozen=True)
class Trace:
    """What a training step holds, in bytes."""

    peak: int
    # By purpose.
    at_peak: dict[str, int]
    # From the forward for the backward pass, logits included.
    kept: int
    gradients: int
    optimizer: int
    # Those of the optimizer's states that it may move to the CPU.
    paged: int
    # Trained weights, and all, adapters included.
    trainable: int
    total: int
    # Of 16-bit matrices, that differ in shape.
    products: int = 0
    # Counted where there are several processes.
    work: Work = Work()
    # By purpose, when the first weights of a shared base come; empty for others.
    at_start: dict[str, int] = field(default_factory=dict)


def trace(
    module: nn.Module,
    batch: Callable[[], Any],
    settings: PlanSettings,
    step: Step | None = None,
    vocabulary: int | None = None,
) -> Trace:
    """Traces a training step of ``module``, a copy on the meta device, which is changed.

    ``batch`` is called where new tensors have no values; ``vocabulary`` tells logits from other
    activations.
    """
    # New adapters draw random numbers, and so may the step: the user's run must not notice.
    with _explained(type(module).__name__), preserved_randomness():
        return _trace(module, batch, settings, step or engine.default_step, vocabulary)


def _trace(
    module: nn.Module,
    batch: Callable[[], Any],
    settings: PlanSettings,
    step: Step,
    vocabulary: int | None,
) -> Trace:
    quantized = _adapt(module, settings)
    adapters = {id(p) for p in engine.all_adapter_parameters(module)}
    names = [name for name, p in module.named_parameters() if id(p) in adapters]
    checkpointing = _checkpoint(module, settings)
    module.train()
    try:
        with fake_mode() as mode, _default_dtype(settings.cast):
            make_fake(module, mode)
            tracker = MemoryTracker(vocabulary, settings.is_padded)
            _enter_weights(module, quantized, names, settings, tracker)
            gathered = share_weights(module, settings, tracker, (QUANTIZED, DENSE))
            return _run(module, batch(), settings, step, tracker, gathered)
    finally:
        checkpointing()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what goes wrong without values into errors that say so."""
    # It prints the trace of every operation that fails.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    except LightningPeftError:
        raise
    except NoLossError as error:
        raise ConfigError(
            f"There is no loss to plan with: {error}. Pass `step`, a function of the module and a "
            "batch that returns one."
        ) from error
    except Exception as error:
        # The module's own code runs here, and other libraries', so anything can be raised.
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise UnsupportedError(
            f"A training step of {name} cannot be traced without values: {type(error).__name__}: "
            f"{reason}. If the step runs with real values, its sizes depend on them (as in some "
            "models of experts), and its memory is not predicted."
        ) from error
    finally:
        logger.disabled = before


def _adapt(module: nn.Module, settings: PlanSettings) -> list[str]:
    quantization = (
        engine.quantization_config(**settings.quantization) if settings.method == "qlora" else None
    )
    if engine.record_of(module) is not None:
        # As the strategy left it: adapters and precision are there.
        if quantization is None or engine.quantized_tensors(module):
            return []
        return engine.quantizable_layers(module, quantization)
    if settings.cast is not None:
        module.to(settings.cast)
    if settings.method == "full":
        module.requires_grad_(True)
        return []
    adapt = None if settings.adapt is None else list(settings.adapt)
    return engine.inject_on_meta(
        module, engine.lora_config(LoRAFields(**settings.lora)), quantization, adapt
    )


def _checkpoint(module: Any, settings: PlanSettings) -> Callable[[], None]:
    """Switches checkpointing on; returns how to switch it off."""
    if not settings.checkpointing or engine.is_checkpointed(module):
        return _nothing
    if settings.method != "full":
        mode = "auto" if settings.gradient_checkpointing == "auto" else True
        return engine.checkpoint_activations(module, mode).disable
    models: list[Any] = [
        m for m in module.modules() if getattr(m, "supports_gradient_checkpointing", False)
    ]
    if not models:
        raise UnsupportedError(
            "gradient_checkpointing=True with method='full': only transformers models have a "
            "switch for it without adapters. Plan without it."
        )
    enable_gradient_checkpointing(models[0], use_reentrant=False)
    models[0].config.use_cache = False
    return _nothing


def _nothing() -> None:
    """Undoes nothing."""


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Lightning's ``*-true`` precisions set it around every step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _enter_weights(
    module: nn.Module,
    quantized: list[str],
    adapters: list[str],
    settings: PlanSettings,
    tracker: MemoryTracker,
) -> None:
    """Quantizes, and enters all weights under what they are."""
    for name in quantized:
        config = engine.quantization_config(**settings.quantization)
        engine.quantize_on_meta(module.get_submodule(name), config)
    codes = engine.quantized_tensors(module)
    tracker.enter(codes, QUANTIZED)
    params = dict(module.named_parameters())
    tracker.enter((params[name] for name in adapters), ADAPTERS)
    known = {*map(id, codes), *(id(params[name]) for name in adapters)}
    tracker.enter((p for p in params.values() if id(p) not in known), DENSE)
    tracker.enter(module.buffers(), DENSE)


def _run(
    module: nn.Module,
    batch: Any,
    settings: PlanSettings,
    step: Step,
    tracker: MemoryTracker,
    gathered: Gathered,
) -> Trace:
    trained = [param for param in module.parameters() if param.requires_grad]
    if engine.has_activation_budget(module):
        # It measures first, and keeps less than allowed meanwhile.
        _loss(module, batch, settings, step).backward()
    name = settings.optimizer_name
    states, needed = state_bytes(trained, name), step_bytes(trained, name, settings.device)
    tracker.hold(OPTIMIZER, states)

    def accumulated(param: Tensor) -> None:
        if param.grad is not None:
            tracker.enter([param.grad], GRADIENTS)

    for param in trained:
        param.grad = torch.empty_like(param)
        param.register_post_accumulate_grad_hook(accumulated)
    gradients = tracker.enter((p.grad for p in trained if p.grad is not None), GRADIENTS)
    if settings.processes > 1:
        tracker.hold(BUCKETS, gradients)
    before, at_start = tracker.total, gathered.at_start(tracker.live)
    kept, batches, counter = 0, min(2, settings.accumulate), WorkCounter()
    with tracker, counter if settings.processes > 1 else nullcontext():
        for index in range(batches):
            loss = _loss(module, batch, settings, step)
            kept = max(kept, tracker.total - before)
            if index == 0:
                for param in trained:
                    param.grad = None
            loss.backward()
            del loss
    tracker.hold(OPTIMIZER, needed)
    count = sum(param.numel() for param in trained)
    return Trace(
        peak=tracker.peak,
        at_peak={purpose: size for purpose, size in tracker.at_peak.items() if size},
        kept=kept,
        gradients=gradients,
        optimizer=states,
        paged=paged_bytes(trained, name) if settings.device == "cuda" else 0,
        trainable=count,
        total=sum(map(engine.parameter_count, module.parameters())),
        products=len(tracker.products),
        work=counter.work(settings.accumulate, batches, count, gathered.batch, gradients),
        at_start=at_start,
    )


def _loss(module: nn.Module, batch: Any, settings: PlanSettings, step: Step) -> Tensor:
    autocast = (
        torch.autocast("cpu", settings.autocast) if settings.autocast is not None else nullcontext()
    )
    with autocast:
        return step(module, batch)

"""Automatic choice of activation checkpointing by available memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_peft import engine
from lightning_peft.errors import LightningPeftError
from lightning_peft.plan import margins
from lightning_peft.plan.batch_size import BatchSize, size_of
from lightning_peft.plan.device_memory import DeviceMemory, readable
from lightning_peft.plan.memory_tracker import ACTIVATIONS, LOGITS
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import from_module

log = logging.getLogger(__name__)

# The rough estimate decides up to this share of the device; above, the planner does. Tracing a step
# of a model with 30 blocks takes seconds, and the estimate is twice too high for usual ones, or
# more.
NEGLIGIBLE = 0.3
# Float32 tensors as wide as the output of each layer that a step keeps: outputs, inputs of
# normalizations, casts and dropout masks. Blocks of transformers keep about two.
_COPIES = 4
_HEADS = 32
# Gradient and Adam's two moments of a trained weight, float32.
_STATE_BYTES = 12


@dataclass(frozen=True)
class ActivationDecision:
    """Whether blocks keep only their inputs for one batch, and why."""

    recompute: bool
    reason: str
    # By how much activations may grow until the answer is no longer certain.
    room: float = 0.0
    # By the planner, which looks at weights and all else too.
    planned: bool = False


def decide_activations(
    module: nn.Module, batch: Any, settings: PlanSettings, device: DeviceMemory
) -> ActivationDecision:
    """Decides for a training step of ``module``, with nothing recomputed, on ``batch``.

    Everything is kept where that leaves 15 % of the device free by the upper end of the prediction.
    Where the step cannot be predicted, blocks keep their inputs only.
    """
    size = size_of(module, batch)
    if size.unknown:
        return ActivationDecision(
            recompute=True, reason=f"the size of the activations is not known: {size.unknown}"
        )
    rough = rough_activation_bytes(module, size)
    allowed = min(NEGLIGIBLE * device.bytes, _left(module, device))
    if rough <= allowed:
        return ActivationDecision(
            recompute=False,
            reason=f"all activations take less than {readable(rough)} by a rough estimate, and "
            f"{device.name} has {readable(device.bytes)}",
            room=allowed / max(1, rough),
        )
    try:
        plan = predict(from_module(module, batch), replace(settings, gradient_checkpointing=False))
    except Exception as error:
        # Whatever it is, it is a fault of the plan and not of the run.
        words = str(error) if isinstance(error, LightningPeftError) else repr(error)
        return ActivationDecision(
            recompute=True,
            reason="the memory of the activations cannot be predicted: "
            + (words.strip().splitlines() or [""])[0].rstrip("."),
        )
    return _decision_of(plan, device)


def _decision_of(plan: Prediction, device: DeviceMemory) -> ActivationDecision:
    needed, limit = plan.high_bytes, margins.COMFORTABLE * device.bytes
    moving = (plan.breakdown[ACTIVATIONS] + plan.breakdown[LOGITS]) / (
        1 - margins.UNDER[device.kind]
    )
    moving *= 1 + (margins.HEAP[2] if device.kind == "cpu" else 0)
    fits = plan.fits_comfortably(device.bytes)
    return ActivationDecision(
        recompute=not fits,
        reason=f"with all activations kept the step takes up to {readable(needed)}, "
        f"{'within' if fits else 'more than'} {margins.COMFORTABLE:.0%} of the "
        f"{readable(device.bytes)} of {device.name}",
        room=1 + (limit - needed) / max(1.0, moving),
        planned=True,
    )


def _left(module: nn.Module, device: DeviceMemory) -> float:
    """Returns the bytes left for activations where as much of the device is kept free."""
    weights = [*module.parameters(), *module.buffers()]
    held = max(device.held, sum(one.numel() * one.element_size() for one in weights))
    trained = sum(param.numel() for param in module.parameters() if param.requires_grad)
    return margins.COMFORTABLE * device.bytes - held - _STATE_BYTES * trained


def surely_fits(module: nn.Module, size: BatchSize, device: DeviceMemory) -> bool:
    """Whether a step fits by a rough estimate already, before it has gradients and states."""
    return not size.unknown and rough_activation_bytes(module, size) <= _left(module, device)


def rough_activation_bytes(module: nn.Module, size: BatchSize) -> int:
    """Returns an estimate that is several times too high for usual models; nothing is run.

    Each element of the batch (a token, a pixel, a feature) is taken to pass through every layer,
    and to attend to as many others as the longest dimension has.
    """
    width = sum(_width(child) for child in module.modules())
    attending = len(engine.adapted_layers(module)) * _heads(module)
    return 4 * size.elements * (_COPIES * width + attending * size.longest)


def _width(layer: nn.Module) -> int:
    """Returns how wide the output of a layer with parameters of its own is."""
    for name in ("out_features", "out_channels", "embedding_dim"):
        if isinstance(size := getattr(layer, name, None), int):
            return size
    own = [param for param in layer.parameters(recurse=False) if param.ndim]
    return max((max(param.shape[:1]) for param in own), default=0)


def _heads(module: nn.Module) -> int:
    """Returns the most heads that a config in ``module`` names, or a usual number."""
    configs = (getattr(child, "config", None) for child in module.modules())
    named = (getattr(config, "num_attention_heads", None) for config in configs)
    return max((number for number in named if isinstance(number, int)), default=_HEADS)

"""Recommended method, with the reason.

The rules are those practitioners give: LoRA where the 16-bit base fits comfortably, because it
is simpler and its steps are faster; QLoRA where it does not, or above about 13 billion weights on
one card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_peft.plan.device_memory import DeviceMemory, readable
from lightning_peft.plan.memory_tracker import ACTIVATIONS, LOGITS
from lightning_peft.plan.prediction import Prediction
from lightning_peft.plan.settings import METHODS, Method

_LARGE = 13_000_000_000


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

"""Checks that evaluation uses the trained adapters.

``nn.TransformerEncoderLayer`` has a fast path for evaluation without gradients that reads raw
weights: wrapped by an adapter that only overrides ``forward``, validation scores the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import tree_leaves
from lightning_peft.engine.adapters import adapted_layers_of
from lightning_peft.engine.layers.adapter import without_adapters
from lightning_peft.engine.mergeable import outermost
from lightning_peft.engine.verification.gradients import (
    Gradients,
    dense_weight,
    owner_of,
    without_gradient,
)
from lightning_peft.engine.verification.probe import ModuleProbe
from lightning_peft.engine.verification.result import Check, abbreviated

# What is called when code reads a weight, or multiplies with one of experts.
_USES = ("effective_weight", "routed_product", "grouped_product", "one_expert")


class Usage(IntEnum):
    """What an evaluation pass did with an adapted layer; a later value overrides an earlier one."""

    UNUSED = 0
    ZERO_INPUT = 1
    NO_EFFECT = 2
    EFFECTIVE = 3


@contextmanager
def recorded_usage(module: nn.Module) -> Iterator[dict[str, Usage]]:
    """Within the body, notes for each adapted layer whether its adapter acts.

    A layer that is called runs once more without its adapter, for comparison. A layer whose
    weight is read acts through the weight.
    """
    layers = adapted_layers_of(module)
    seen = dict.fromkeys(layers, Usage.UNUSED)
    others = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    # Not by hooks: torch leaves its fast paths, which are to be watched, where there are any.
    for name, layer in layers.items():
        layer.__dict__["forward"] = _recording_forward(name, layer, seen)
        for attribute in _USES:
            if hasattr(layer, attribute):
                layer.__dict__[attribute] = _recording_use(name, getattr(layer, attribute), seen)
    try:
        yield seen
    finally:
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            for attribute in _USES:
                layer.__dict__.pop(attribute, None)
            if others[name] is not None:
                layer.__dict__["forward"] = others[name]


def _recording_forward(name: str, layer: Any, seen: dict[str, Usage]) -> Callable[..., Any]:
    own_forward = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own_forward(*args, **kwargs)
        before = seen[name]
        with without_adapters(layer), torch.no_grad():
            base = own_forward(*args, **kwargs)
        if _differ(output, base):
            now = Usage.EFFECTIVE
        else:
            now = (
                Usage.NO_EFFECT
                if any(x.any() for x in _tensors((args, kwargs)))
                else Usage.ZERO_INPUT
            )
        # The run without the adapter may have read the weight, which the module did not.
        seen[name] = max(before, now)
        return output

    return forward


def _recording_use(
    name: str, use: Callable[..., Tensor], seen: dict[str, Usage]
) -> Callable[..., Tensor]:
    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        seen[name] = Usage.EFFECTIVE
        return use(*args, **kwargs)

    return recorded


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _differ(output: Any, base: Any) -> bool:
    pairs = zip(_tensors(output), _tensors(base), strict=True)
    return any(not torch.equal(a, b) for a, b in pairs)


def adapters_act_in_evaluation(
    probe: ModuleProbe,
    gradients: Gradients,
    first: Mapping[str, Usage],
    loss: Tensor,
    then: dict[str, Usage],
) -> Check:
    """Whether each adapter that training reaches has an effect in evaluation too.

    Args:
        probe: The module, with the same adapter values as in ``then``.
        gradients: Gradients of the adapters in train mode.
        first: What was noted in the first evaluation pass, with other values of the adapters.
        loss: The loss of the second one.
        then: What was noted in the second one.
    """
    name = "adapters act in evaluation as they do in training"
    layers = adapted_layers_of(probe.module)
    silent = set(without_gradient(gradients))
    trained = {owner_of(tensor, layers) for tensor in gradients if tensor not in silent}
    # Those inside another wrapper are computed with by that one.
    outer = outermost(layers)
    missing = [n for n in outer if n in trained and then[n] in (Usage.UNUSED, Usage.NO_EFFECT)]
    if not trained:
        return Check(name, None, "training reaches no adapter")
    ignored = [n for n in missing if then[n] == Usage.NO_EFFECT]
    stale = [n for n in missing if then[n] == Usage.UNUSED and first[n] != Usage.UNUSED]
    unused = [n for n in missing if n not in ignored and n not in stale]
    bypassed = _bypassed(probe, {n: layers[n] for n in unused}, loss)
    problems = []
    if ignored:
        problems.append(f"called without effect in eval mode: {abbreviated(ignored)}")
    if stale:
        problems.append(f"evaluation keeps a copy of an old weight: {abbreviated(stale)}")
    if bypassed:
        problems.append(f"evaluation reads the weight without the adapter: {abbreviated(bypassed)}")
    if unused and len(unused) == len(trained) and not problems:
        problems.append("evaluation uses none of the adapted layers")
    if problems:
        return Check(name, False, "; ".join(problems))
    if unused:
        names = abbreviated(unused)
        detail = f"used in training only: {names}; right for layers that only serve training"
        return Check(name, None, detail)
    return Check(name, True, f"{len(trained)} layers")


def _bypassed(probe: ModuleProbe, layers: Mapping[str, Any], loss: Tensor) -> list[str]:
    """Returns ``layers`` if the loss in evaluation depends on their bare weights."""
    weights = [w for layer in layers.values() if (w := dense_weight(layer)) is not None]
    if not weights:
        return []
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight) * weight.float().std().to(weight.dtype))
        changed = probe.evaluate()
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
    return [] if torch.equal(changed, loss) else list(layers)

"""Checks of gradients and evaluation by real passes.

bitsandbytes' repacked layers say that they require gradients and pass nothing on. And
``nn.TransformerEncoderLayer`` has a fast path for evaluation without gradients that reads raw
weights: wrapped by an adapter that only overrides ``forward``, validation scores the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch import tree_leaves
from lightning_peft.engine.adapters import adapted_layers_of, adapter_parameters
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.layers.adapter import AdapterLayer, without_adapters
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.layers.probes import probe_input
from lightning_peft.engine.mergeable import outermost
from lightning_peft.engine.record import adapted_parts, require_record
from lightning_peft.engine.verification.probe import ModuleProbe
from lightning_peft.engine.verification.result import Check, abbreviated

Gradients = Mapping[str, "Tensor | None"]
# What is called when code reads a weight, or multiplies with one of experts.
_USES = ("effective_weight", "routed_product", "grouped_product", "one_expert")


def active_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapter tensors that require gradients, by their names inside ``module``."""
    return {
        entry.qualified(name): param
        for entry, part in adapted_parts(module)
        for name, param in adapter_parameters(part).items()
        if param.requires_grad
    }


def owner_of(tensor: str, layers: Mapping[str, Any]) -> str:
    """Returns the name of the innermost of ``layers`` that ``tensor`` is in."""
    return max((n for n in layers if not n or tensor.startswith(f"{n}.")), key=len)


def base_passes_gradients(module: nn.Module) -> Check:
    """Compares each quantized layer's input gradient with the one of its dequantized weight.

    The gradients of adapters below would hide it, since the path around the layer passes some.
    """
    name = "gradients pass through every quantized layer after an evaluation pass"
    layers = {n: x for n, x in module.named_modules() if isinstance(x, QuantizedLayer)}
    if require_record(module).shards > 1:
        return Check(name, None, "each process has a part of each weight")
    wrong = [layer_name for layer_name, layer in layers.items() if not _passes_gradient(layer)]
    if not layers:
        return Check(name, None, "no layer is quantized")
    return Check(
        name, not wrong, f"wrong at: {abbreviated(wrong)}" if wrong else f"{len(layers)} layers"
    )


def _probed(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns a small input of a quantized layer, and what the weight makes of it."""
    if isinstance(layer, nn.MultiheadAttention):
        quantized: Any = layer
        size, dtype = layer.embed_dim, quantized.weight_info()[1]
        probe = torch.randn(4, size, device=stored_parameter(layer).device, dtype=dtype)
        return probe.requires_grad_(True), F.linear(probe, layer.in_proj_weight)
    found: Any = probe_input(layer)
    return found.requires_grad_(True), layer.forward(found)


def _passes_gradient(layer: Any) -> bool:
    with without_adapters(layer) if isinstance(layer, AdapterLayer) else nullcontext():
        probe, output = _probed(layer)
        direction = torch.randn_like(output)
        if not output.requires_grad:
            return False
        (found,) = torch.autograd.grad(output, probe, direction, allow_unused=True)
        (expected,) = torch.autograd.grad(layer.dense_output(probe), probe, direction.float())
    if found is None:
        return False
    # Half-precision products lose a few per mille; a lost or mangled gradient is far off.
    return bool((found.float() - expected.float()).norm() <= 0.05 * expected.float().norm())


def without_gradient(gradients: Gradients) -> list[str]:
    """Returns the names of the tensors that got no gradient, or one of zeros."""
    return [name for name, grad in gradients.items() if grad is None or not grad.any()]


def gradients_reach_adapters(probe: ModuleProbe, gradients: Gradients) -> Check:
    """With every factor non-zero, each adapter must have got a gradient.

    Where none arrives, the layer's own weight is asked for one: if it gets any, the module uses
    the weight without the adapter, and the adapter is dead. If not, the loss does not depend on
    the layer (it is not called, or fed with zeros), which is not a fault of the adapter.
    """
    name = "gradients reach every adapter after an evaluation pass"
    if not gradients:
        return Check(name, False, "no adapter requires gradients")
    silent = without_gradient(gradients)
    layers = adapted_layers_of(probe.module)
    owners = list(dict.fromkeys(owner_of(tensor, layers) for tensor in silent))
    weights = {n: weight for n in owners if (weight := dense_weight(layers[n])) is not None}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        unused = without_gradient(probe.gradients(weights)) if weights else []
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    dead = [n for n in weights if n not in unused]
    if dead:
        why = "the module uses the weight without calling the layer"
        return Check(name, False, f"none at {abbreviated(dead)}: {why}")
    idle = f"; the loss does not depend on {abbreviated(owners)}" if owners else ""
    reached = len(gradients) - len(silent)
    if not reached:
        return Check(name, False, f"none of {len(gradients)} tensors gets one{idle}")
    return Check(name, True, f"{reached} tensors{idle}")


def dense_weight(layer: Any) -> Tensor | None:
    """Returns the stored weight of an adapted layer.

    ``None`` where it is packed, none, or shared by processes, each of which may ask another way.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if getattr(base, "is_sharded", False):
        return None
    weight = base._parameters.get("weight")
    return weight if weight is not None and weight.is_floating_point() else None


def same_gradients(before: Gradients, again: Gradients, after: Gradients) -> Check:
    """Compares gradients from before and after an evaluation pass, bit for bit."""
    name = "gradients are the same before and after an evaluation pass"
    if _differing(before, again):
        return Check(name, None, "two equal training steps give different gradients already")
    changed = _differing(before, after)
    detail = (
        f"changed: {abbreviated(changed)}" if changed else f"{len(before)} tensors, bit for bit"
    )
    return Check(name, not changed, detail)


def _differing(first: Gradients, second: Gradients) -> list[str]:
    return [name for name, a in first.items() if not _equal(a, second[name])]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # Bits, so that a gradient of NaN is equal to itself.
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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
    """Whether each adapter that training reaches has an effect in evaluation too."""
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

"""Checks before merging: which adapters can be merged exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.peft import BaseTunerLayer
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.backends.registry import requantizes_when_merged
from lightning_peft.engine.layers.expert_weights import ExpertWeight, parameter_name
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.layers.tokens import TiedRows
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError, UnsupportedError, itemize


def outermost(layers: dict[str, Any]) -> dict[str, Any]:
    """Returns ``layers`` without those inside another one, which merges them with itself."""
    wrappers = [name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)]
    return {
        name: layer
        for name, layer in layers.items()
        if not inside(name, [wrapper for wrapper in wrappers if wrapper != name])
    }


def check_mergeable(module: nn.Module, layers: dict[str, Any]) -> None:
    """Refuses layers whose weight is shared or has no form with the adapter built in."""
    problems = []
    holders = _holders(module)
    for name, layer in outermost(layers).items():
        others = _others(name, layer, holders)
        if others:
            problems.append(
                f"{name} shares its weight with {', '.join(others)}, which would change too. "
                "Untie the weights first"
            )
        problem = _problem_of(layer)
        problems += [f"{name} {problem}"] if problem else []
    if problems:
        raise UnsupportedError("These layers cannot be merged:" + itemize(problems))


def _problem_of(layer: Any) -> str | None:
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if layer is not base and requantizes_when_merged(layer):
        return (
            "is in PEFT's wrapper for quantized layers, which would quantize the sum again and "
            "lose part of the adapter. Load the adapter onto the dense base "
            "(lightning_peft.load_adapter) and merge there"
        )
    if "weight" not in base._parameters and hasattr(base, "weight"):
        return (
            "computes its weight in each forward pass (weight norm or another parametrization), so "
            "that what is merged into it would be lost. Remove that from the base first "
            "(torch.nn.utils.parametrize.remove_parametrizations), or keep the adapter apart"
        )
    if hasattr(layer, "lora_A") and isinstance(base, CONVOLUTION_LIKE) and base.groups > 1:
        return (
            f"is a grouped convolution (groups={base.groups}), and its adapter adds to all input "
            "channels: no kernel has that built in. Keep the adapter apart, or leave the layer "
            "out by `exclude_modules` before training"
        )
    if any(getattr(layer, "lora_bias", {}).values()) and base.bias is None:
        return (
            "has lora_bias=True, and no bias of its own for PEFT to merge it into. Give the layer "
            "a bias before training, or keep the adapter apart"
        )
    return None


def _holders(module: nn.Module) -> dict[int, list[tuple[str, Tensor]]]:
    """Returns the stored parameters by the memory they lie in, with the names of their modules."""
    found: dict[int, list[tuple[str, Tensor]]] = {}
    for name, child in module.named_modules():
        # What is merged for the one changes the other as it is meant.
        for param in () if isinstance(child, TiedRows) else child._parameters.values():
            if param is not None:
                found.setdefault(_memory(param), []).append((name, param))
    return found


def _memory(param: Tensor) -> int:
    address = 0 if param.is_meta else param.untyped_storage().data_ptr()
    return address or id(param)


def _others(name: str, layer: nn.Module, holders: dict[int, list[tuple[str, Tensor]]]) -> list[str]:
    own = {child for child, _ in layer.named_modules(prefix=name)}
    if isinstance(layer, ExpertWeight):
        own.add(name.rpartition(".")[0])
    changed = base_parameters(layer, name).values()
    shared = {
        other.removesuffix(".base_layer"): None
        for param in changed
        for other, held in holders[_memory(param)]
        if other not in own and share_memory(param, held)
    }
    return list(shared)


def base_parameters(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameters of ``layer``, which is called ``name``, besides its adapters, by name."""
    adapters = {id(param) for param in adapter_parameters(layer).values()}
    found: dict[str, Tensor] = dict(layer.named_parameters(prefix=name))
    if isinstance(layer, ExpertWeight):
        found[parameter_name(name)] = stored_parameter(layer)
    return {key: param for key, param in found.items() if id(param) not in adapters}


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a change of one tensor could change the other; both lie in one storage."""
    if one is other:
        return True
    if one.is_meta or one.dtype != other.dtype or one.numel() == 0:
        return one.dtype != other.dtype
    size = one.untyped_storage().nbytes() // one.element_size()
    marks = torch.zeros(size, dtype=torch.bool, device="cpu")
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def check_values(layers: dict[str, Any], in_full: Mapping[str, Tensor]) -> None:
    """Refuses adapters whose values cannot be merged now, with the names of all of them."""
    off = [name for name, layer in layers.items() if layer.disable_adapters]
    if off:
        raise LifecycleError(
            "Adapters are switched off, so merging now would leave them out of the weights of:"
            + itemize(off, 5)
            + "\nMerge outside of lightning_peft.disable_adapters."
        )
    problems = []
    for name, layer in layers.items():
        for key, value in layer.named_parameters(prefix=name):
            if value.is_meta:
                problems.append(f"{key} is on the meta device and has no values. Load them first")
    active = {name for layer in layers.values() for name in layer.active_adapters}
    values = {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in adapter_parameters(layer).items()
        if not active.isdisjoint(key.split("."))
    }
    for key, value in {**values, **in_full}.items():
        broken = 0 if value.is_meta else int((~torch.isfinite(value)).sum())
        if broken:
            problems.append(
                f"{key}: {broken} of {value.numel()} values are NaN or infinite. Load an adapter "
                "from before training diverged"
            )
    if problems:
        raise UnsupportedError(
            "These adapters cannot be merged, and nothing was changed:" + itemize(problems, 5)
        )

"""Folding adapters into the base, with the error of it measured.

Dense weights become ``W + s B A`` within their rounding. A quantized weight is dequantized first
and stays dense: that is the base the adapter was trained on, while quantizing the sum again, as
is usual, throws part of the adapter away. The report says by how much for both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapted_layers_of
from lightning_peft.engine.layers.in_place import parameter
from lightning_peft.engine.layers.lora import LoraLayer, detach, wide_dtype, without_adapters
from lightning_peft.engine.layers.quantization import make_dense, make_quantized, requantized
from lightning_peft.engine.layers.quantized import FourBitLayer, QuantizedLayer, is_quantized
from lightning_peft.engine.memory.causal_lm_loss import restore_losses
from lightning_peft.engine.record import require_record, set_record
from lightning_peft.engine.twins import unfollow
from lightning_peft.errors import LifecycleError, UnsupportedError, itemize


@dataclass
class MergedLayer:
    """The error of one merged layer.

    Attributes:
        name: The layer.
        was_quantized: Whether its weight was dequantized for the merge.
        error: ``||stored - (W + s B A)|| / ||s B A||``: which share of the adapter is lost to
            rounding; ``None`` where PEFT merged its own wrapper.
        requantized_error: The same if the sum were quantized again; ``None`` for dense layers.
    """

    name: str
    was_quantized: bool
    error: float | None
    requantized_error: float | None


@dataclass
class MergeReport:
    """What :func:`merge` did.

    Attributes:
        layers: One entry per layer merged by this call; empty if all were merged before.
    """

    layers: list[MergedLayer] = field(default_factory=list)

    @property
    def worst_error(self) -> float:
        """The largest share of an adapter that was lost to rounding."""
        return max((x.error for x in self.layers if x.error is not None), default=0.0)

    def __str__(self) -> str:
        """Returns the report as sentences."""
        if not self.layers:
            return "nothing to merge: the active adapters are merged already"
        text = f"merged {len(self.layers)} layers"
        measured = [layer for layer in self.layers if layer.error is not None]
        if measured:
            text += f"; of the adapter's effect at most {self.worst_error:.2e} is lost to rounding"
        if len(measured) < len(self.layers):
            text += f"; {len(self.layers) - len(measured)} by PEFT, whose rounding is not measured"
        quantized = [layer for layer in self.layers if layer.was_quantized]
        again = [x.requantized_error for x in quantized if x.requantized_error is not None]
        if again:
            text += (
                f"; {len(quantized)} quantized layers are dense now (quantizing them again would "
                f"lose up to {max(again):.2f} of it)"
            )
        return text


@torch.no_grad()
def merge(module: nn.Module, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Folds the active adapters into the base weights; doing it twice does it once.

    Args:
        module: A module with adapters.
        dtype: Dtype of weights that were quantized; by default the one that they had before.

    Returns:
        The measured error of every layer.

    Raises:
        LifecycleError: If the module has no adapters.
        UnsupportedError: If a layer shares its weight with another one (merging would change
            both), or PEFT's wrapper cannot merge without quantizing again.
    """
    layers = adapted_layers_of(module, require_record(module))
    check_mergeable(module, layers)
    merged = [_merge_layer(layer, name, dtype) for name, layer in layers.items()]
    return MergeReport([layer for layer in merged if layer is not None])


def check_mergeable(module: nn.Module, layers: dict[str, Any]) -> None:
    """Refuses layers whose weight is shared, or that PEFT would quantize again.

    Raises:
        UnsupportedError: With the names of all such layers.
    """
    holders: dict[int, list[str]] = {}
    for name, child in module.named_modules():
        for param in child._parameters.values():
            holders.setdefault(id(param), []).append(name)
    problems = []
    for name, layer in layers.items():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        shared = holders.get(id(base._parameters.get("weight")), [])
        others = [other for other in shared if other.removesuffix(".base_layer") != name]
        if others:
            problems.append(
                f"{name} shares its weight with {', '.join(others)}, which would change too. "
                "Untie the weights first"
            )
        if isinstance(layer, BaseTunerLayer) and type(layer).__module__.endswith(".bnb"):
            problems.append(
                f"{name} is in PEFT's wrapper for quantized layers, which would quantize the sum "
                "again and lose part of the adapter. Load the adapter onto the dense base "
                "(lightning_peft.load_adapter) and merge there"
            )
    if problems:
        raise UnsupportedError("These layers cannot be merged:" + itemize(problems))


def _merge_layer(layer: Any, name: str, dtype: torch.dtype | None) -> MergedLayer | None:
    if isinstance(layer, BaseTunerLayer):
        return None if layer.merged else _merge_by_peft(layer, name, dtype)
    todo = layer.running()
    if not todo:
        return None
    quantized = is_quantized(layer)
    with without_adapters(layer):
        base = layer.effective_weight()
    delta, target = weight_sum(layer, base, todo)
    stored = target.to((dtype or base.dtype) if quantized else base.dtype)
    again = requantized(layer, target.to(base.dtype)) if isinstance(layer, FourBitLayer) else None
    if quantized:
        layer.lora_unmerged_weight = make_dense(layer, stored.contiguous())
    else:
        parameter(layer, "weight").copy_(stored)
    layer.lora_merged = (*layer.lora_merged, *todo)
    return MergedLayer(
        name=name,
        was_quantized=quantized,
        error=relative_norm(stored.to(target.dtype) - target, delta),
        requantized_error=None if again is None else relative_norm(again.float() - target, delta),
    )


def weight_sum(layer: Any, base: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Returns ``s B A`` of the adapters ``names`` of ``layer``, and ``base`` plus that.

    Both are in a dtype to add in: float32, or float64 where ``base`` is.
    """
    delta = torch.stack([layer.lora_delta(name).to(base.device) for name in names]).sum(0)
    return delta, base.to(wide_dtype(base)) + delta


def _merge_by_peft(layer: Any, name: str, dtype: torch.dtype | None) -> MergedLayer:
    base = layer.get_base_layer()
    quantized = isinstance(base, QuantizedLayer)
    if quantized:
        weight = base.effective_weight()
        base.unmerged_weight = make_dense(base, weight.to(dtype or weight.dtype).contiguous())
    layer.merge(safe_merge=True)
    return MergedLayer(name=name, was_quantized=quantized, error=None, requantized_error=None)


def relative_norm(difference: Tensor, reference: Tensor) -> float:
    """Returns ``||difference|| / ||reference||``; zero where the reference is zero."""
    scale = reference.norm().item()
    return difference.norm().item() / scale if scale > 0 else 0.0


@torch.no_grad()
def unmerge(module: nn.Module) -> None:
    """Undoes :func:`merge`: quantized layers get their exact weights back, dense ones ``- s B A``.

    Subtracting in floating point leaves rounding errors of the weight's dtype, as PEFT's does.

    Raises:
        LifecycleError: If the module has no adapters.
    """
    for layer in adapted_layers_of(module, require_record(module)).values():
        if isinstance(layer, BaseTunerLayer):
            layer.unmerge()
            undo = layer.get_base_layer().__dict__.pop("unmerged_weight", None)
            if undo is not None:
                make_quantized(layer.get_base_layer(), undo)
        elif layer.lora_merged:
            _unmerge_layer(layer)


def _unmerge_layer(layer: Any) -> None:
    if layer.lora_unmerged_weight is not None:
        make_quantized(layer, layer.lora_unmerged_weight)
        layer.lora_unmerged_weight, layer.lora_merged = None, ()
        return
    weight = parameter(layer, "weight")
    delta = torch.stack([layer.lora_delta(name) for name in layer.lora_merged]).sum(0)
    weight.copy_((weight.to(wide_dtype(weight)) - delta.to(weight.device)).to(weight.dtype))
    layer.lora_merged = ()


@torch.no_grad()
def unload(module: nn.Module) -> nn.Module:
    """Takes all adapters off: layers get their classes back, and the record goes.

    After :func:`merge`, the module is an ordinary dense one with the adapter built in: layers
    that were quantized without an adapter are dequantized too. Without a merge, the base comes
    back as it was adapted, quantized layers included. Parameters stay frozen. The module itself
    is changed, and returned for convenience.

    Raises:
        LifecycleError: If the module has no adapters, or some active ones are merged and others
            are not.
    """
    record = require_record(module)
    layers = adapted_layers_of(module, record)
    merged = [layer for layer in layers.values() if _is_merged(layer)]
    if merged and any(isinstance(x, LoraLayer) and x.running() for x in layers.values()):
        raise LifecycleError(
            "Some active adapters are merged and others are not. Merge or unmerge all of them "
            "before unloading."
        )
    for layer in layers.values():
        if isinstance(layer, LoraLayer):
            detach(layer)
    _unwrap(module)
    unfollow(module, record.twins)
    restore_losses(module)
    if merged:
        for child in list(module.modules()):
            if isinstance(child, QuantizedLayer):
                make_dense(child, child.effective_weight().contiguous())
    set_record(module, None)
    return module


def _is_merged(layer: Any) -> bool:
    return bool(layer.lora_merged if isinstance(layer, LoraLayer) else layer.merged)


def _unwrap(module: nn.Module) -> None:
    """Puts the layers that PEFT wrapped back into their parents."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.get_base_layer().__dict__.pop("unmerged_weight", None)
                setattr(parent, name, child.get_base_layer())
        parent.__dict__.pop("peft_config", None)

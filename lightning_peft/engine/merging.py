"""Folding adapters into the base, with the error of it measured.

Dense weights become ``W + s B A`` within their rounding. A quantized weight is dequantized first
and stays dense: that is the base the adapter was trained on, while quantizing the sum again, as
is usual, throws part of the adapter away. The report says by how much for both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.engine.lora import LoraLayer, detach
from lightning_peft.engine.quantization import (
    FourBitLayer,
    dense_weight,
    is_quantized,
    make_dense,
    make_quantized,
    requantized,
)
from lightning_peft.engine.record import require_record, set_record
from lightning_peft.errors import LifecycleError, UnsupportedError, itemize


@dataclass
class MergedLayer:
    """The error of one merged layer.

    Attributes:
        name: The layer.
        was_quantized: Whether its weight was dequantized for the merge.
        error: ``||stored - (W + s B A)|| / ||s B A||``: which share of the adapter is lost to
            rounding.
        requantized_error: The same if the sum were quantized again; ``None`` for dense layers.
    """

    name: str
    was_quantized: bool
    error: float
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
        return max((layer.error for layer in self.layers), default=0.0)

    def __str__(self) -> str:
        """Returns the report as sentences."""
        if not self.layers:
            return "nothing to merge: the active adapters are merged already"
        quantized = [layer for layer in self.layers if layer.was_quantized]
        text = (
            f"merged {len(self.layers)} layers; of the adapter's effect at most "
            f"{self.worst_error:.2e} is lost to rounding"
        )
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
            both), or PEFT's wrapper cannot merge.
    """
    record = require_record(module)
    _refuse_shared(module)
    result = MergeReport()
    for part_name, entry in record.parts.items():
        for name, layer in adapted_layers(module.get_submodule(part_name)).items():
            merged = _merge_layer(layer, entry.qualified(name), dtype)
            if merged is not None:
                result.layers.append(merged)
    return result


def _refuse_shared(module: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(param), []).append(name)
    layers = {id(x): name for name, x in adapted_layers(module).items() if isinstance(x, LoraLayer)}
    problems = []
    for name, layer in module.named_modules():
        if id(layer) not in layers:
            continue
        shared = owners[id(layer.weight)]
        holders = {id(module.get_submodule(n.rpartition(".")[0])) for n in shared}
        if len(holders) > 1:
            problems.append(f"{name} shares its weight with {', '.join(shared)}")
    if problems:
        raise UnsupportedError(
            "Merging would change layers that have no adapter:"
            + itemize(problems)
            + "\nUntie the weights first, or keep the adapter separate."
        )


def _merge_layer(layer: nn.Module, name: str, dtype: torch.dtype | None) -> MergedLayer | None:
    if isinstance(layer, BaseTunerLayer):
        return _merge_by_peft(layer, name)
    assert isinstance(layer, LoraLayer)
    todo = [a for a in layer.lora_active if a in layer.lora_adapters and a not in layer.lora_merged]
    if not todo:
        return None
    quantized = is_quantized(layer)
    base = dense_weight(layer)
    stored_dtype = (dtype or base.dtype) if quantized else base.dtype
    delta = torch.stack([layer.lora_delta(a).to(base.device) for a in todo]).sum(0)
    target = base.float() + delta
    stored = target.to(stored_dtype)
    again = requantized(layer, target.to(base.dtype)) if isinstance(layer, FourBitLayer) else None
    if quantized:
        layer.lora_unmerged_weight = make_dense(layer, stored.contiguous())
    else:
        layer.weight.data.copy_(stored)
    layer.lora_merged = (*layer.lora_merged, *todo)
    return MergedLayer(
        name=name,
        was_quantized=quantized,
        error=_relative(stored.float() - target, delta),
        requantized_error=None if again is None else _relative(again.float() - target, delta),
    )


def _relative(difference: Tensor, reference: Tensor) -> float:
    scale = reference.norm().item()
    return difference.norm().item() / scale if scale > 0 else 0.0


def _merge_by_peft(layer: BaseTunerLayer, name: str) -> MergedLayer | None:
    if layer.merged:
        return None
    if is_quantized(layer.get_base_layer()):
        raise UnsupportedError(
            f"{name} is a quantized layer in PEFT's own wrapper, which would quantize the merged "
            "weight again and lose part of the adapter. Load the adapter onto the dense base "
            "(lightning_peft.load_adapter) and merge there."
        )
    layer.merge(safe_merge=True)
    return MergedLayer(name=name, was_quantized=False, error=0.0, requantized_error=None)


@torch.no_grad()
def unmerge(module: nn.Module) -> None:
    """Undoes :func:`merge`: quantized layers get their exact weights back, dense ones ``- s B A``.

    Subtracting in floating point leaves rounding errors of the weight's dtype, as PEFT's does.

    Raises:
        LifecycleError: If the module has no adapters.
    """
    record = require_record(module)
    for part_name in record.parts:
        for layer in adapted_layers(module.get_submodule(part_name)).values():
            if isinstance(layer, BaseTunerLayer):
                layer.unmerge()
            elif isinstance(layer, LoraLayer) and layer.lora_merged:
                _unmerge_layer(layer)


def _unmerge_layer(layer: LoraLayer) -> None:
    if layer.lora_unmerged_weight is not None:
        make_quantized(layer, layer.lora_unmerged_weight)
        layer.lora_unmerged_weight, layer.lora_merged = None, ()
        return
    delta = torch.stack([layer.lora_delta(name) for name in layer.lora_merged]).sum(0)
    layer.weight.data.copy_((layer.weight.float() - delta).to(layer.weight.dtype))
    layer.lora_merged = ()


def unload(module: nn.Module) -> nn.Module:
    """Takes all adapters off: layers get their classes back, and the record goes.

    Merged layers keep the merged weight; call :func:`merge` first for a model with the adapter
    built in. The module itself is changed, and returned for convenience.

    Raises:
        LifecycleError: If the module has no adapters.
        UnsupportedError: If PEFT wrapped the layers.
    """
    record = require_record(module)
    wrapped = [
        name for name, layer in adapted_layers(module).items() if isinstance(layer, BaseTunerLayer)
    ]
    if wrapped:
        raise UnsupportedError(
            "PEFT wrapped these layers and replaced them in their parents:"
            + itemize(wrapped, 5)
            + "\nSave the adapter and build the module again."
        )
    for part_name in record.parts:
        for layer in adapted_layers(module.get_submodule(part_name)).values():
            assert isinstance(layer, LoraLayer)
            partly = [name for name in layer.lora_active if name in layer.lora_adapters]
            if layer.lora_merged and set(partly) - set(layer.lora_merged):
                raise LifecycleError(
                    "Some active adapters are merged and others are not. Merge or unmerge all of "
                    "them before unloading."
                )
            detach(layer)
    set_record(module, None)
    return module

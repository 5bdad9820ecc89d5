"""Merging of adapters into the base, with a measured error.

Dense weights become ``W + s B A`` within their rounding. A quantized weight is dequantized first
and stays dense: that is the base the adapter was trained on, while quantizing the sum again, as
is usual, throws part of the adapter away. The report has the loss of both ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import Tensor, nn

from lightning_peft.compat.peft import BaseTunerLayer
from lightning_peft.engine.adapters import (
    adapted_layers_of,
    adapter_parameters,
    is_merged,
)
from lightning_peft.engine.backends.conversion import (
    convert_to_dense,
    requantize,
    restore_quantized,
)
from lightning_peft.engine.backends.layers import QuantizedBackup, QuantizedLayer
from lightning_peft.engine.layers.adapter import accumulation_dtype, without_adapters
from lightning_peft.engine.layers.probes import in_eval_mode, probe_input, rounding_tolerance
from lightning_peft.engine.mergeable import (
    base_parameters,
    check_mergeable,
    check_values,
    outermost,
)
from lightning_peft.engine.record import adapted_parts, refuse_sharded
from lightning_peft.engine.rollback import floating_tensors, restored_on_error
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import UnsupportedError, itemize

P = ParamSpec("P")
T = TypeVar("T")


def _without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Returns ``function`` for calls under autocast too, which would round its products."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call


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


def merge(module: nn.Module, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Folds the active adapters into the base weights; doing it twice does it once.

    All layers are merged or none: after an error, every weight is bit for bit what it was. Until
    the last layer is merged, the weights from before are kept on the CPU.

    Args:
        module: A module with adapters.
        dtype: Dtype of weights that were quantized; by default the one that they had before.

    Returns:
        The measured error of every layer.

    Raises:
        LifecycleError: If the module has no adapters, or they are switched off.
        UnsupportedError: If a layer shares its weight with another one (merging would change
            both), has no weight with the adapter built in, or values of the adapter or of the
            merged weights are not finite; or if PEFT refuses to merge a layer that it wrapped.
    """
    refuse_sharded(module, "Merging")
    return merge_layers(module, lambda layer, name: merge_layer(layer, name, dtype))


@torch.inference_mode(False)
@torch.no_grad()
@_without_autocast
def merge_layers(
    module: nn.Module, merge_one: Callable[[Any, str], MergedLayer | None]
) -> MergeReport:
    """Merges the layers of ``module`` by a function of each and its name: all or none."""
    layers = adapted_layers_of(module)
    check_mergeable(module, layers)
    layers = outermost(layers)
    check_values(layers, _trained_in_full(module))
    with restored_on_error(layers.values(), floating_tensors(layers.values())):
        merged = [merge_one(layer, name) for name, layer in layers.items()]
        _refuse_overflow(layers)
    return MergeReport([layer for layer in merged if layer is not None])


def _trained_in_full(module: nn.Module) -> dict[str, Tensor]:
    """Returns heads, saved modules and biases by name: merged or not, they are in the result."""
    found: dict[str, Tensor] = {}
    for entry, part in adapted_parts(module):
        adapters = {id(param) for param in adapter_parameters(part).values()}
        for name, param in part.named_parameters():
            mine = name in entry.initial_values or inside(name, entry.heads)
            if mine and param.is_floating_point() and id(param) not in adapters:
                found[entry.qualified(name)] = param
    return found


def _refuse_overflow(layers: dict[str, Any]) -> None:
    problems = []
    for name, layer in layers.items():
        for key, value in base_parameters(layer, name).items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                problems.append(f"{key} ({str(value.dtype).removeprefix('torch.')})")
    if problems:
        raise UnsupportedError(
            "The weights would hold values that are NaN or infinite, and nothing was changed:"
            + itemize(problems, 5)
            + "\nThe base or, when unmerging, the adapter has such values itself, or its dtype "
            "ends before the sum does: float16 ends at 65504. Call module.float() or "
            "module.bfloat16() first, or merge a quantized "
            "base with another `dtype`."
        )


def merge_layer(layer: Any, name: str, dtype: torch.dtype | None = None) -> MergedLayer | None:
    """Merges the running adapters of one layer; ``None`` where none runs."""
    if isinstance(layer, BaseTunerLayer):
        return None if layer.merged else _merge_by_peft(layer, name, dtype)
    todo = layer.effective_adapters()
    if not todo:
        return None
    quantized = isinstance(layer, QuantizedLayer)
    with without_adapters(layer):
        base = layer.effective_weight()
    delta, target = merged_weight(layer, base, todo)
    stored = target.to((dtype or base.dtype) if quantized else base.dtype)
    again = requantize(layer, target.to(base.dtype)) if quantized else None
    if quantized:
        layer.quantized_backup = convert_to_dense(layer, stored.contiguous())
    else:
        layer.store_weight(stored)
    layer.merged_adapters = (*layer.merged_adapters, *todo)
    return MergedLayer(
        name=name,
        was_quantized=quantized,
        error=relative_norm(stored.to(target.dtype) - target, delta),
        requantized_error=None if again is None else relative_norm(again.float() - target, delta),
    )


def merged_weight(layer: Any, base: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Returns the sum that the adapters ``names`` add to ``base``, and ``base`` plus that.

    Both are in a dtype to add in: float32, or float64 where ``base`` is.
    """
    base = base.to(accumulation_dtype(base))
    delta = layer.summed_delta(base, names)
    return delta, base + delta


@dataclass
class _UnmergeState:
    """What of a layer that PEFT wrapped cannot be computed back from the merged weight.

    Attributes:
        bias: A copy of its bias, or ``None``.
        weight: Its quantized weight, or ``None`` where it was dense.
        backend: What PEFT reads and writes the quantized weight with.
        replaced: The layer whose place a trained copy of it took.
    """

    bias: Tensor | None
    weight: QuantizedBackup | None = None
    backend: Any = None
    replaced: tuple[nn.Module, ...] = ()


def _merge_by_peft(layer: Any, name: str, dtype: torch.dtype | None) -> MergedLayer:
    base = layer.get_base_layer()
    probe = probe_input(base)
    expected = None if probe is None else _probed(layer, probe)
    tolerance = 0.0 if expected is None else rounding_tolerance(base, expected.dtype)
    bias = base._parameters.get("bias")
    base.before_merge = before = _UnmergeState(None if bias is None else bias.detach().clone())
    quantized = isinstance(base, QuantizedLayer)
    if quantized:
        weight = base.effective_weight()
        before.weight = convert_to_dense(base, weight.to(dtype or weight.dtype).contiguous())
        # What PEFT found beneath when it wrapped the layer: it would look for codes there.
        before.backend = getattr(layer, "quantization_backend", None)
        layer.quantization_backend = None
    try:
        if isinstance(layer, LNTuningLayer):
            _merge_copy(layer)
        else:
            layer.merge(safe_merge=True)
    except Exception as error:
        raise UnsupportedError(
            f"PEFT cannot merge {name} ({type(layer).__name__}), and nothing was changed: {error}"
        ) from error
    if probe is not None and expected is not None:
        change = relative_norm(_probed(layer, probe).float() - expected.float(), expected.float())
        if not change <= tolerance:
            raise UnsupportedError(
                f"PEFT's merge of {name} ({type(layer).__name__}) computes another function: for "
                f"random input its output changes by {change:.0%}. Nothing was changed. Keep the "
                "adapter apart."
            )
    return MergedLayer(name=name, was_quantized=quantized, error=None, requantized_error=None)


def _merge_copy(layer: Any) -> None:
    """Puts a copy of the trained layer in the base's place.

    PEFT exchanges the two, after which files of the adapter would hold the base.
    """
    (name,) = [name for name in layer.active_adapters if name in layer.ln_tuning_layers]
    base = layer.base_layer
    layer.base_layer = copy.deepcopy(layer.ln_tuning_layers[name]).requires_grad_(False)
    # Not as a submodule: it is not part of the model now.
    layer.base_layer.__dict__["before_merge"] = _UnmergeState(None, replaced=(base,))
    base.__dict__.pop("before_merge")
    layer.merged_adapters.append(name)


def _probed(layer: Any, probe: Tensor) -> Tensor:
    with in_eval_mode(layer):
        output: Tensor = layer(probe)
    return output


def relative_norm(difference: Tensor, reference: Tensor) -> float:
    """Returns ``||difference|| / ||reference||``; zero where the reference is zero."""
    scale = reference.norm().item()
    return difference.norm().item() / scale if scale > 0 else 0.0


@torch.inference_mode(False)
@torch.no_grad()
@_without_autocast
def unmerge(module: nn.Module) -> None:
    """Undoes :func:`merge`: quantized layers get their exact weights back, dense ones ``- s B A``.

    Subtracting in floating point leaves rounding errors of the weight's dtype, as PEFT's does.

    Raises:
        LifecycleError: If the module has no adapters.
        UnsupportedError: If PEFT cannot undo its own merge; nothing is changed then.
    """
    layers = outermost(adapted_layers_of(module))
    with restored_on_error(layers.values(), floating_tensors(layers.values())):
        for name, layer in layers.items():
            if not is_merged(layer):
                continue
            if isinstance(layer, BaseTunerLayer):
                _unmerge_by_peft(layer, name)
            else:
                _unmerge_layer(layer)
        _refuse_overflow(layers)


def _unmerge_by_peft(layer: Any, name: str) -> None:
    before = layer.get_base_layer().__dict__.get("before_merge")
    if before is not None and before.replaced:
        (layer.base_layer,) = before.replaced
        layer.merged_adapters.clear()
        return
    try:
        layer.unmerge()
    except Exception as error:
        raise UnsupportedError(
            f"PEFT cannot undo its merge of {name} ({type(layer).__name__}), and nothing was "
            f"changed: {error}"
        ) from error
    base = layer.get_base_layer()
    before = base.__dict__.pop("before_merge", None)
    if before is None:
        return
    if before.weight is not None:
        restore_quantized(base, before.weight)
        layer.quantization_backend = before.backend
    bias = base._parameters.get("bias")
    if bias is not None and before.bias is not None and not bias.requires_grad:
        bias.copy_(before.bias)


def _unmerge_layer(layer: Any) -> None:
    if layer.quantized_backup is not None:
        restore_quantized(layer, layer.quantized_backup)
        layer.quantized_backup, layer.merged_adapters = None, ()
        return
    with without_adapters(layer):
        weight = layer.effective_weight()
    merged = weight.to(accumulation_dtype(weight))
    layer.store_weight(layer.restored_weight(merged, layer.merged_adapters).to(weight.dtype))
    layer.merged_adapters = ()

"""Merging of an adapter into a base, one weight in memory at a time.

The model exists as an outline on the meta device. Each weight of the base is handed in as it is
read, and what :func:`lightning_peft.merge` would make of it is handed back: the same functions, so
the same bits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.compat.transformers import float32_modules
from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.engine.backends.conversion import convert_to_dense, quantize, requantize
from lightning_peft.engine.backends.registry import quantization_from_dict
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.files.adapter_fields import checked_fields
from lightning_peft.engine.files.adapter_format import read_adapter, recorded_base
from lightning_peft.engine.files.adapter_loading import load_adapter, refuse_residual_base
from lightning_peft.engine.fingerprint import Fingerprint
from lightning_peft.engine.injection import EXPERTS
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.expert_weights import expose_experts, parameter_name, weight_name
from lightning_peft.engine.layers.tokens import TiedRows, TokenLayer
from lightning_peft.engine.merging import check_mergeable, merged_weight, relative_norm
from lightning_peft.engine.record import Record, require_record
from lightning_peft.engine.selection.planning import (
    InjectionRequest,
    layers_to_quantize,
    make_plans,
)
from lightning_peft.errors import CheckpointError, ConfigError, UnsupportedError, itemize

Into = Literal["dequantized", "original"]
_ADAPTER = "default"


@dataclass
class WeightErrors:
    """How far merged weights of one layer are from what was trained, for each way of merging.

    Each number is ``||merged - (W + s B A)|| / ||s B A||`` with the ``W`` that the adapter was
    trained on: which share of the adapter's effect is lost.

    Attributes:
        name: The layer.
        dequantized: With the dequantized base, as stored; ``None`` if the base was dense.
        original: With the base as it is in its file, as stored.
        requantized: With the sum quantized again; ``None`` where there is no such way.
    """

    name: str
    dequantized: float | None
    original: float
    requantized: float | None


class StreamedMerge:
    """Merges the adapter in a folder into weights that are handed in one by one.

    Args:
        outline: The base model on the meta device. It is changed.
        folder: The adapter, in PEFT's format.
        into: ``"dequantized"`` merges into what the quantized base stands for, which is what the
            adapter was trained on; ``"original"`` into the weights as they are handed in. By
            default the first where the base was quantized by the adapter's record.
        dtype: Dtype of the merged weights; by default that of those handed in, and bfloat16 for
            those wider than 16 bits.

    Attributes:
        outline: The base model on the meta device, with the adapter.
        into: Which way.
        settings: How the base was quantized in training; ``None`` where it was not.
        quantized: Names of the layers that were quantized in training.

    Raises:
        CheckpointError: If the adapter is damaged or does not fit the outline.
        ConfigError: If ``into`` needs something that the record does not have.
        UnsupportedError: If the adapter cannot be merged weight by weight.
    """

    def __init__(
        self,
        outline: nn.Module,
        folder: Path,
        *,
        into: Into | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        written, _, facts = read_adapter(folder)
        fields, self._facts = checked_fields(written, folder, warn=False), facts
        self.settings = quantization_from_dict(facts.get("quantization"))
        self.into: Into = into or ("original" if self.settings is None else "dequantized")
        self.dtype = dtype
        self._errors: dict[str, WeightErrors] = {}
        self._check_way(facts, folder)
        # Plain layers, one of which at a time becomes a real and quantized one.
        self._plain = copy.deepcopy(outline)
        self.quantized = _quantized_in_training(self._plain, fields, facts, self.settings)
        for name in self.quantized:
            # Biases are not quantized, and these have no values to move.
            held = self._plain.get_submodule(name)._parameters
            if "bias" in held:
                held["bias"] = None
        load_adapter(outline, folder, adapter_name=_ADAPTER, check_base=False)
        self.outline = outline
        self._layers = adapted_layers(outline)
        self._check_layers()
        # The folder has what their codes stand for after merges in training.
        brought = self.replaced()
        self.quantized -= {name for name in self.quantized if weight_name(name) in brought}
        self._owners = self._layers_by_weight()
        names = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
        self._dtype_in_training = names.get((facts.get("base") or {}).get("dtype") or "")
        self._wide = float32_modules(outline)

    def _check_way(self, facts: dict[str, Any], folder: Path) -> None:
        if self.into == "original":
            return
        if self.settings is None:
            raise ConfigError(
                f"into='dequantized': the record of the adapter in {str(folder)!r} does not say "
                "that its base was quantized, so there are no dequantized weights to merge into. "
                "Use 'original'."
            )
        refuse_residual_base(facts, folder)

    def _check_layers(self) -> None:
        others = [
            name
            for name, layer in self._layers.items()
            if not isinstance(layer, AdapterLayer) or layer.weight_name != "weight"
        ]
        plain = ((name, self._plain.get_submodule(name)) for name in self.quantized)
        others += [name for name, layer in plain if isinstance(layer, nn.MultiheadAttention)]
        if others:
            raise UnsupportedError(
                f"{others[0]} has an adapter in PEFT's own layers, or is an attention or recurrent "
                "layer of torch, which are not merged weight by weight. In Python, with the "
                "whole model in memory: lightning_peft.load_adapter(model, folder), "
                "lightning_peft.merge(model), lightning_peft.unload(model), "
                "model.save_pretrained(output)."
            )
        check_mergeable(self.outline, self._layers)

    def _layers_by_weight(self) -> dict[str, str]:
        """Returns the names of adapted and quantized layers by every name of their weights."""
        changed = {*self._layers, *self.quantized}
        owners = {weight_name(name): name for name in changed}
        first = {id(x): name for name, x in self.outline.named_modules() if name in changed}
        for name, layer in self.outline.named_modules(remove_duplicate=False):
            held = layer.token_layer if isinstance(layer, TiedRows) else layer
            if id(held) in first:
                owners.setdefault(weight_name(name), first[id(held)])
        return owners

    @property
    def errors(self) -> list[WeightErrors]:
        """One entry for each adapted layer that was merged."""
        return list(self._errors.values())

    def check_complete(self) -> None:
        """Raises where the weight of an adapted layer was not handed in."""
        lacking = [name for name in self._layers if name not in self._errors]
        if lacking:
            raise CheckpointError(
                "The files of the base have no weights for these layers under the names that the "
                "model gives them, so that the merged model would lack their adapters:"
                + itemize(lacking, 5)
                + "\nWrite the base again by its save_pretrained, and name that folder by --base."
            )

    @property
    def base(self) -> Fingerprint:
        """Names and shapes of the frozen weights, in the order of their checksums.

        The checksums themselves are not there: the outline has no values.
        """
        entry = require_record(self.outline).parts[""]
        return recorded_base(entry.loaded, self._facts, [*entry.saved, *entry.heads])

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Returns the tensors of the adapter, which the meta copy adds to the base."""
        layers = self._layers.values()
        return [param for layer in layers for param in layer.adapter_tensors(_ADAPTER).values()]

    def replaced(self) -> dict[str, Tensor]:
        """Returns the parameters and buffers that come from the adapter's file in full, by name."""
        own = {id(param) for param in self.adapter_parameters()}
        return {
            name: value.detach()
            for name, value in self.outline.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not value.is_meta and id(value) not in own
        }

    @torch.no_grad()
    def merged(self, name: str, dense: Tensor) -> Tensor:
        """The tensor of the merged model in place of one of the base."""
        owner = self._owners.get(name)
        if owner is None:
            stored = dense.to(self.dtype_of(name, dense.dtype))
        else:
            stored = self._merged_weight(owner, dense)
        if stored.is_floating_point() and not torch.isfinite(stored).all():
            why = "the base or the adapter has such values itself"
            if stored.dtype == torch.float16 and dense.dtype != torch.float16:
                why = "float16 ends at 65504. Use bfloat16"
            raise CheckpointError(
                f"{name} would hold values that are not finite in the merged model: {why}."
            )
        return stored

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the merged tensor ``name``, which has ``shape`` in the base."""
        owner = self._owners.get(name)
        layer = None if owner is None else self._layers.get(owner)
        return tuple(layer.weight_info()[0]) if isinstance(layer, TokenLayer) else shape

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype in which the tensor ``name``, which has ``dtype``, is written."""
        kept = any(part in self._wide for part in name.split("."))
        if kept or not dtype.is_floating_point or dtype.itemsize < 2:
            return dtype
        return self.dtype or (dtype if dtype.itemsize == 2 else torch.bfloat16)

    def _merged_weight(self, owner: str, dense: Tensor) -> Tensor:
        layer, dtype = self._layers.get(owner), self.dtype_of(f"{owner}.weight", dense.dtype)
        # New rows of a vocabulary, which the adapter has all of.
        added = self.shape_of(f"{owner}.weight", dense.shape)[0] - len(dense)
        dense = functional.pad(dense, (0, 0, 0, added)) if added else dense
        if owner not in self.quantized:
            delta, target = merged_weight(layer, dense, [_ADAPTER])
            stored = target.to(dtype)
            error = relative_norm(stored.to(target.dtype) - target, delta)
            self._errors[owner] = WeightErrors(owner, None, error, None)
            return stored
        assert self.settings is not None
        plain: Any = self._plain.get_submodule(owner)
        empty = plain._parameters["weight"]
        in_training = dense.to(self._dtype_in_training or dense.dtype)
        plain._parameters["weight"] = nn.Parameter(in_training, requires_grad=False)
        quantize(plain, self.settings)
        base = plain.effective_weight()
        stored = self._sum(layer, plain, owner, base, dense, dtype)
        convert_to_dense(plain, empty)
        return stored

    def _sum(
        self, layer: Any, plain: Any, owner: str, base: Tensor, dense: Tensor, dtype: torch.dtype
    ) -> Tensor:
        if layer is None:
            return (base if self.into == "dequantized" else dense).to(dtype)
        delta, target = merged_weight(layer, base, [_ADAPTER])
        ways = {
            "dequantized": target.to(dtype),
            "original": (dense.to(delta.dtype) + delta).to(dtype),
        }
        lost = {way: relative_norm(w.to(delta.dtype) - target, delta) for way, w in ways.items()}
        twice = requantize(plain, target.to(base.dtype))
        again = None if twice is None else relative_norm(twice.to(delta.dtype) - target, delta)
        self._errors[owner] = WeightErrors(owner, lost["dequantized"], lost["original"], again)
        return ways[self.into]


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _quantized_in_training(
    plain: nn.Module,
    fields: dict[str, Any],
    facts: dict[str, Any],
    settings: Any | None,
) -> set[str]:
    if settings is None:
        return set()
    recorded = facts.get("modules_to_save")
    saved = None if recorded is None else {"": list(recorded)}
    request = InjectionRequest(config_from_dict(fields), None, _ADAPTER, saved)
    expose_experts(plain)
    plans = make_plans(plain, request, [""], Record())
    names = {name for plan in plans for name in layers_to_quantize(plan, settings)}
    if (facts.get("base") or {}).get(EXPERTS):
        return names
    return {name for name in names if parameter_name(name) == name}

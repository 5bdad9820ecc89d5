"""A transformers quantizer that quantizes one tensor at a time.

Where the cache has the codes of a layer, its tensor in the file is not read at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_peft.compat.transformers import (
    ConversionOps,
    HfQuantizer,
    WeightConverter,
    forget_quantization,
    has_registered_conversions,
    skip_while_loading,
    tied_parameters,
    weight_conversions,
)
from lightning_peft.engine.backends.conversion import (
    convert_to_dense,
    release_freed_memory,
    use_backend,
)
from lightning_peft.engine.backends.packed import PackedWeight, current_share
from lightning_peft.engine.backends.registry import backend_for, storage_bytes
from lightning_peft.engine.fingerprint import checksum
from lightning_peft.engine.layers.expert_weights import (
    ExpertWeight,
    expose_experts,
    parameter_name,
    weight_name,
    withdraw_experts,
)
from lightning_peft.engine.layers.kinds import LINEAR_LIKE
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.loading.quantized_cache import CachedLoad, CachedWeight, DenseInfo
from lightning_peft.engine.selection.parts import (
    find_heads,
    inside,
    output_embeddings,
    parameter_holders,
)

_METHOD = "lightning_peft"
_FACTS = "_dense_facts"
_DEFERRED = "_deferred_dtype"


@dataclass
class Loading:
    """What is loaded how, while it is.

    Attributes:
        settings: The config of a quantization backend.
        device: Where the model ends up.
        dense: Names, relative to the model, of modules that stay dense.
        cached: Whether the cache of quantized bases is used.
        dense_experts: Whether weights of experts stay dense.
        layers: The layers that were quantized while they were loaded, by their names.
        loads: The calls that the cache may serve, in order, with their models.
    """

    settings: Any
    device: torch.device
    dense: list[str]
    cached: bool = False
    dense_experts: bool = False
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)
    loads: list[CachedLoad] = field(default_factory=list)


@register_quantization_config(_METHOD)
class StreamedConfig(QuantizationConfigMixin):
    """Carries a :class:`Loading` through ``from_pretrained``."""

    def __init__(self, loading: Loading, streams: bool, cached: CachedLoad | None) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.loading, self.streams, self.cached = loading, streams, cached

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        """The entry in a model's config while it is being loaded."""
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _StreamedQuantizer(HfQuantizer):
    """Quantizes each chosen weight when it is read, and its layer in place at the end."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loading: Loading = quantization_config.loading
        self.streams: bool = quantization_config.streams
        self.cached: CachedLoad | None = quantization_config.cached
        packs = backend_for(self.loading.settings).can_be_packed
        self.share = current_share() if packs else None
        self.facts: dict[str, DenseInfo] = {}
        self.chosen: dict[str, str] = {}
        self.known: dict[str, CachedWeight] = {}
        self.packed: dict[str, PackedWeight] = {}
        self.undo: list[Callable[[], None]] = []

    @property
    def quantized_element_size(self) -> float:
        """Bytes for each parameter."""
        return backend_for(self.loading.settings).bits / 8

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        expose_experts(model)
        backend = None if self.loading.dense_experts else backend_for(self.loading.settings)
        candidates = quantizable(model, self.loading.dense, backend)
        # A load may read newer files of the hub than those that were hashed.
        if (
            self.cached is not None
            and covered_by_cache(model)
            and self.cached.unchanged(checkpoint_files)
        ):
            shapes = {n: stored_parameter(model.get_submodule(n)).shape for n in candidates}
            self.known = {
                name: weight
                for name, weight in self.cached.weights.items()
                if shapes.get(name) == weight.facts.shape
            }
        if self.known:
            self.undo.append(skip_while_loading(model, [weight_name(name) for name in self.known]))
        if self.streams:
            linear = [n for n in candidates if not isinstance(model.get_submodule(n), Conv1D)]
            self.chosen = {weight_name(name): name for name in linear if name not in self.known}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the file becomes codes."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> Any:
        """The operation that quantizes one tensor."""
        return _QuantizeOne(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        while self.undo:
            self.undo.pop()()
        for name, weight in self.known.items():
            layer = model.get_submodule(name)
            layer._parameters["weight"] = weight.stored
            self._note(name, layer, weight.facts)
            if self.share is not None:
                layer.pack_weight(self.loading.device, self.share)
            if weight.deferred:
                layer.__dict__[_DEFERRED] = layer.weight_info()[1]
        for name, facts in self.facts.items():
            self._note(name, model.get_submodule(name), facts)
        withdraw_experts(model)
        # The model is what it would be had it been quantized after loading.
        self.remove_quantization_config(model)
        forget_quantization(model)

    def _note(self, name: str, layer: Any, facts: DenseInfo) -> None:
        backend, packed = backend_for(self.loading.settings), self.packed.get(name)
        known = stored_parameter(layer) if packed is None else packed.template
        use_backend(layer, self.loading.settings, backend.weight_info(known)[1])
        if packed is not None:
            layer.packed = packed
        layer.__dict__[_FACTS] = facts
        self.loading.layers.append((name, layer))

    def is_serializable(self) -> bool:
        """Nothing is serialized by this class."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters are trained on it."""
        return True


class _QuantizeOne(ConversionOps):
    def __init__(self, quantizer: _StreamedQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the quantized parameter for a dense tensor, and notes what that was."""
        quantizer = self.quantizer
        settings, device = quantizer.loading.settings, quantizer.loading.device
        backend = backend_for(settings)
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            if name in quantizer.chosen:
                layer = quantizer.chosen[name]
                facts = DenseInfo(checksum(dense), tuple(dense.shape), storage_bytes(dense))
                quantizer.facts[layer] = facts
                dense = backend.quantize(dense.flatten(0, -2), settings, device)
                if quantizer.share is not None:
                    packed = quantizer.packed[layer] = PackedWeight(backend, dense, device)
                    dense = packed.release(quantizer.share)
            result[name] = dense
        if device.type == "cpu":
            release_freed_memory()
        return result


def quantizable(model: nn.Module, dense: list[str], backend: Any | None = None) -> list[str]:
    """Returns the names of the layers that injection would quantize whatever is trained."""
    output, holders = output_embeddings(model), parameter_holders(model)
    shared = {name.removesuffix(".weight") for name in tied_parameters(model)}
    heads = list(find_heads(model))
    return [
        name
        for name, child in model.named_modules()
        if (
            backend is not None and backend.takes_experts(child)
            if isinstance(child, ExpertWeight)
            else type(child) in LINEAR_LIKE
        )
        and child is not output
        and name not in shared
        and not inside(name, heads)
        and not any(f".{part}." in f".{parameter_name(name)}." for part in dense)
        and len(holders[id(child._parameters["weight"])]) == 1
    ]


def covered_by_cache(model: PreTrainedModel) -> bool:
    """Whether codes by the names of layers can stand for what is read from the file.

    Not where one tensor of the file becomes several of the model: transformers goes by the name of
    the first, and does not load the others without it. Nor where the user registered conversions,
    which are not part of the key.
    """
    return not has_registered_conversions(model) and not any(
        isinstance(each, WeightConverter) and len(each.target_patterns) > 1
        for each in weight_conversions(model)
    )


def dense_info(layer: nn.Module) -> DenseInfo | None:
    """A layer's weight as it was before quantization on loading; ``None`` without any."""
    return layer.__dict__.get(_FACTS)


def deferred_dtype(layer: nn.Module) -> torch.dtype | None:
    """Returns the dtype of a weight that would be dense still if the cache had not had its codes.

    PEFT makes factors in the dtype of a dense weight, so that they are rounded to it.
    """
    return layer.__dict__.get(_DEFERRED)


def restore_dense_layer(layer: Any, weight: Tensor) -> None:
    """Makes a layer whose codes came from the cache the dense one that was loaded without it."""
    convert_to_dense(layer, weight)
    layer._parameters["weight"].requires_grad_(True)
    for mark in (_FACTS, _DEFERRED, "packed"):
        layer.__dict__.pop(mark, None)

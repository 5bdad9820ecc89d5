"""Loading a transformers model that is quantized as its file is read, tensor by tensor.

transformers' own 4-bit loading keeps freed memory (see ``_return_freed_memory``), replaces layers,
and forgets what a base fingerprint is made of. This is its extension point for other methods.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lightning_peft.engine.fingerprint import Fingerprint, checksum, fingerprint
from lightning_peft.engine.layers.in_place import extend, parameter
from lightning_peft.engine.layers.quantization import _fill_linear4bit, _return_freed_memory
from lightning_peft.engine.layers.quantized import FourBitLayer, storage_bytes
from lightning_peft.engine.record import record_of
from lightning_peft.engine.selection.parts import (
    find_heads,
    find_parts,
    inside,
    output_embeddings,
    parameter_holders,
)
from lightning_peft.errors import UnsupportedError, itemize

_METHOD = "lightning_peft_4bit"
_FACTS = "_dense_facts"
# Arguments with which the caller says where and how, and loading is left alone.
_OWN_WAYS = (
    "quantization_config",
    "device_map",
    "device_mesh",
    "distributed_config",
    "tp_plan",
    "tp_size",
    "gguf_file",
    "state_dict",
    "load_in_4bit",
    "load_in_8bit",
)


@dataclass
class Loading:
    """What is loaded how, while it is.

    Attributes:
        settings: 4-bit settings.
        device: Where the model ends up.
        dense: Names, relative to the model, of modules that stay dense.
        layers: The layers that were quantized while they were loaded, by their names.
    """

    settings: BitsAndBytesConfig
    device: torch.device
    dense: list[str]
    layers: list[tuple[str, nn.Module]] = field(default_factory=list)


@dataclass(frozen=True)
class DenseFacts:
    """What the record of a base wants to know of a weight that is dense no more."""

    checksum: int
    shape: tuple[int, ...]
    bytes: int


_current: ContextVar[Loading | None] = ContextVar("quantized_loading", default=None)
_patching = threading.Lock()
_users = 0
_original: Any = None


@contextmanager
def quantized_loading(
    settings: BitsAndBytesConfig, device: torch.device, dense: list[str]
) -> Iterator[Loading]:
    """Within the body, ``from_pretrained`` of this thread quantizes linear layers as it reads them.

    Only where it says nothing of quantization, devices or distribution itself, the file is not
    quantized already, and it saves memory. Heads, output embeddings and tied layers stay dense.

    Args:
        settings: 4-bit settings.
        device: Where the model goes.
        dense: Names of further modules that stay dense; parts of names count too.

    Yields:
        What was loaded.
    """
    loading = Loading(settings, device, dense)
    token = _current.set(loading)
    _patch()
    try:
        yield loading
    finally:
        _unpatch()
        _current.reset(token)


@contextmanager
def loading_for_injection(
    module: nn.Module,
    peft_config: Any,
    settings: BitsAndBytesConfig | None,
    adapt: Any,
    device: torch.device,
) -> Iterator[None]:
    """Within the body, models are loaded as the injection that follows would quantize them.

    Not for 8 bits, for initialisations that need the dense weight, for modules with adapters, and
    where ``adapt`` names parts, which cannot be told apart before they are built.

    Raises:
        UnsupportedError: If something was loaded that injection would not have quantized.
    """
    needs_dense = getattr(peft_config, "init_lora_weights", True) not in (True, False, "gaussian")
    if settings is None or settings.load_in_8bit or adapt or needs_dense or record_of(module):
        yield
        return
    dense = [
        *(settings.llm_int8_skip_modules or []),
        *(getattr(peft_config, "modules_to_save", None) or []),
    ]
    with quantized_loading(settings, device, dense) as loading:
        yield
    check_loaded(module, loading)


def _patch() -> None:
    global _users, _original
    with _patching:
        _users += 1
        if _users == 1:
            _original = PreTrainedModel.__dict__["from_pretrained"]
            PreTrainedModel.from_pretrained = classmethod(_wrapped(_original.__func__))  # type: ignore[method-assign,assignment]


def _unpatch() -> None:
    global _users
    with _patching:
        _users -= 1
        if _users == 0:
            PreTrainedModel.from_pretrained = _original  # type: ignore[method-assign]


def _wrapped(original: Any) -> Any:
    @wraps(original)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        loading = _current.get()
        own = any(kwargs.get(key) is not None for key in _OWN_WAYS)
        if loading is None or own or not _worthwhile(loading, name, kwargs):
            return original(cls, name, *args, **kwargs)
        kwargs["quantization_config"] = _StreamedConfig(loading)
        kwargs["device_map"] = {"": loading.device}
        result = original(cls, name, *args, **kwargs)
        if loading.device.type == "cpu":
            _return_freed_memory()
        return result

    return from_pretrained


def _worthwhile(loading: Loading, name: Any, kwargs: dict[str, Any]) -> bool:
    """Says whether this takes less memory than to load dense weights and quantize them then.

    Not on the CPU in the dtype of the file: such weights stay in the memory-mapped file until they
    are quantized one by one, and the fingerprint is taken before there are others (measured).
    """
    where = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
    # What is in the file: a config object that is passed on says what was asked for.
    try:
        written, _ = PreTrainedConfig.get_config_dict(
            name, **{key: kwargs[key] for key in where if key in kwargs}
        )
    except OSError:
        # Weights alone; the config was given.
        written = {}
    parts = [written, *(value for value in written.values() if isinstance(value, dict))]
    given: Any = kwargs.get("config")
    if any("quantization_config" in part for part in parts) or (
        getattr(given, "quantization_config", None) is not None
    ):
        return False
    if loading.device.type != "cpu":
        return True
    wanted = _plain(kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto")
    stored = next((_plain(p[k]) for p in parts for k in ("dtype", "torch_dtype") if p.get(k)), None)
    return wanted not in ("auto", stored)


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@register_quantization_config(_METHOD)
class _StreamedConfig(QuantizationConfigMixin):
    """Carries a :class:`Loading` through ``from_pretrained``."""

    def __init__(self, loading: Loading) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.loading = loading

    def __deepcopy__(self, memo: dict[int, Any]) -> _StreamedConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns what a model's config may say of it while it is being loaded."""
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _StreamedQuantizer(HfQuantizer):
    """Quantizes each chosen weight when it is read, and its layer in place at the end."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loading: Loading = quantization_config.loading
        self.facts: dict[str, DenseFacts] = {}
        self.chosen: set[str] = set()

    @property
    def quantized_element_size(self) -> float:
        """Bytes for each weight."""
        return 0.5

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.chosen = {f"{name}.weight" for name in _streamable(model, self.loading.dense)}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Says whether a tensor of the file becomes codes."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> Any:
        """Returns what quantizes one tensor."""
        return _QuantizeOne(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, facts in self.facts.items():
            layer = model.get_submodule(name)
            extend(layer, FourBitLayer, base=bnb.nn.Linear4bit)
            _fill_linear4bit(layer)
            layer.compute_dtype = self.loading.settings.bnb_4bit_compute_dtype
            layer.__dict__[_FACTS] = facts
            self.loading.layers.append((name, layer))
        # The model is what it would be had it been quantized after loading.
        self.remove_quantization_config(model)
        model.__dict__.pop("is_quantized", None)
        for child in model.modules():
            if isinstance(child, PreTrainedModel):
                child.config.__dict__.pop("_is_quantized", None)

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
        """Returns the 4-bit parameter for a dense tensor, and notes what that was."""
        settings = self.quantizer.loading.settings
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            if name in self.quantizer.chosen:
                facts = DenseFacts(checksum(dense), tuple(dense.shape), storage_bytes(dense))
                self.quantizer.facts[name.removesuffix(".weight")] = facts
                packed: Any = bnb.nn.Params4bit(
                    dense.contiguous(),
                    requires_grad=False,
                    compress_statistics=settings.bnb_4bit_use_double_quant,
                    quant_type=settings.bnb_4bit_quant_type,
                )
                dense = packed.to(self.quantizer.loading.device)
            result[name] = dense
        if self.quantizer.loading.device.type == "cpu":
            _return_freed_memory()
        return result


def _streamable(model: nn.Module, dense: list[str]) -> list[str]:
    """Returns the names of the linear layers that injection would quantize whatever is trained."""
    output, holders = output_embeddings(model), parameter_holders(model)
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {name.removesuffix(".weight") for pair in dict(tied).items() for name in pair}
    heads = list(find_heads(model))
    return [
        name
        for name, child in model.named_modules()
        if type(child) is nn.Linear
        and child is not output
        and name not in shared
        and not inside(name, heads)
        and not any(f".{part}." in f".{name}." for part in dense)
        and len(holders[id(child._parameters["weight"])]) == 1
        and not isinstance(child, Conv1D)
    ]


def check_loaded(module: nn.Module, loading: Loading) -> None:
    """Checks that what was quantized while it was loaded is what injection would quantize.

    Raises:
        UnsupportedError: If layers are outside of the adapted parts, or heads of them.
    """
    quantizable: set[int] = set()
    for part in find_parts(module).values():
        heads = {id(child) for head in find_heads(part).values() for child in head.modules()}
        quantizable |= {id(child) for child in part.modules()} - heads
    others = [name for name, layer in loading.layers if id(layer) not in quantizable]
    if others:
        raise UnsupportedError(
            "from_pretrained in configure_model quantized these layers as it loaded them, and "
            f"{type(module).__name__} does not have them in its adapted parts, or has them as "
            "heads:"
            + itemize(others, 5)
            + "\nPass device_map={'': 'cpu'} to that from_pretrained: then it loads dense weights, "
            "and what is to be quantized is quantized afterwards."
        )


def dense_facts(layer: nn.Module) -> DenseFacts | None:
    """Returns what a layer's weight was before it was quantized on loading, if it was."""
    return layer.__dict__.get(_FACTS)


def dense_bytes(layer: nn.Module) -> int:
    """Returns the bytes of a layer's weight before it was quantized."""
    facts = dense_facts(layer)
    return facts.bytes if facts else storage_bytes(parameter(layer, "weight"))


def base_fingerprint(part: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Returns the fingerprint of tensors of ``part`` as if all had been loaded dense."""
    named = list(tensors)
    facts: dict[str, DenseFacts] = {}
    for name, _ in named:
        owner, _, leaf = name.rpartition(".")
        known = dense_facts(part.get_submodule(owner)) if leaf == "weight" else None
        if known is not None:
            facts[name] = known
    rest = fingerprint((name, tensor) for name, tensor in named if name not in facts)
    found = dict(zip(rest.names, zip(rest.shapes, rest.sums, strict=True), strict=True))
    found |= {name: (known.shape, known.checksum) for name, known in facts.items()}
    if facts:
        # Nothing is quantized after this, which would do it.
        _return_freed_memory()
    return Fingerprint(
        names=tuple(name for name, _ in named),
        shapes=tuple(found[name][0] for name, _ in named),
        sums=tuple(found[name][1] for name, _ in named),
    )

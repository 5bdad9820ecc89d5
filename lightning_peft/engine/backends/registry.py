"""Registry of quantization backends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_peft.engine.backends import bnb_config
from lightning_peft.engine.backends.aqlm import AQLM
from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.bnb4 import FOUR_BIT
from lightning_peft.engine.backends.bnb8 import EIGHT_BIT
from lightning_peft.engine.backends.compressed import COMPRESSED_TENSORS
from lightning_peft.engine.backends.gptq import AUTO_ROUND, AWQ, GPTQ
from lightning_peft.engine.backends.hqq import HQQ
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.quanto import QUANTO
from lightning_peft.engine.backends.torchao import TORCHAO
from lightning_peft.errors import ConfigError

Backend = QuantizationBackend[Any]

_LOADED: list[Backend] = [TORCHAO, QUANTO, COMPRESSED_TENSORS, HQQ, GPTQ, AWQ, AUTO_ROUND, AQLM]
_BACKENDS: list[Backend] = [FOUR_BIT, EIGHT_BIT, *_LOADED]


def register_backend(backend: Backend) -> None:
    """Registers a backend; another instance of its class is replaced.

    Args:
        backend: An instance. Several may share a ``config_type`` and ``name``, where
            ``accepts`` distinguishes their configs.
    """
    _BACKENDS[:] = [known for known in _BACKENDS if type(known) is not type(backend)]
    _BACKENDS.append(backend)


def backends() -> tuple[Backend, ...]:
    """All registered backends."""
    return tuple(_BACKENDS)


def backend_for(config: Any) -> Backend:
    """The backend that a config means."""
    named = [backend for backend in _BACKENDS if isinstance(config, backend.config_type)]
    for backend in named:
        if backend.accepts(config):
            return backend
    for backend in named:
        backend.check_config(config)
    types = sorted({backend.config_type.__name__ for backend in _BACKENDS})
    raise ConfigError(
        f"quantization_config={config!r}: there is no quantization backend for "
        f"{type(config).__name__}. There are some for {', '.join(types)}, and for those that are "
        "registered by lightning_peft.engine.register_backend."
    )


def backend_of(stored: Any) -> Backend | None:
    """The backend that made a parameter, or ``None`` for a dense one."""
    return next((backend for backend in _BACKENDS if backend.owns(stored)), None)


def claiming_backend(layer: nn.Module) -> Backend | None:
    """The backend for a layer that a library quantized, and that is not one of this package's."""
    if isinstance(layer, (QuantizedLayer, ScriptModule)):
        return None
    return next((backend for backend in _BACKENDS if backend.claims(layer)), None)


def requantizes_when_merged(wrapper: nn.Module) -> bool:
    """Whether PEFT's wrapper is one for quantized layers, which merges into codes."""
    name = type(wrapper).__module__.rpartition(".")[2]
    return any(name in backend.peft_modules for backend in _BACKENDS)


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` is quantized, by this package or before."""
    return isinstance(layer, QuantizedLayer) or claiming_backend(layer) is not None


def quantization_constants(param: Tensor) -> list[Tensor]:
    """The scales that a quantized parameter carries; an empty list for a dense one."""
    backend = backend_of(param)
    return [] if backend is None else backend.constants(param)


def storage_bytes(param: Tensor) -> int:
    """Bytes that a parameter occupies, with the constants of its quantization.

    Tables (of 4-bit types: 16 and 256 numbers per layer) are left out, as is usual.
    """
    tensors = [param, *quantization_constants(param)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameter_count(param: Tensor) -> int:
    """How many parameters a tensor stands for (4-bit types pack two in a byte)."""
    backend = backend_of(param)
    return param.numel() if backend is None else backend.weight_info(param)[0].numel()


def workspace_bytes(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Bytes that an operator of a backend's library takes while it runs; 0 for all others."""
    found = (backend.workspace_bytes(operation, args, kwargs) for backend in _BACKENDS)
    return next((size for size in found if size is not None), 0)


def is_dequantization(operation: Any) -> bool:
    """Whether an operator's result is a dequantized weight."""
    return any(backend.is_dequantization(operation) for backend in _BACKENDS)


def quantization_to_dict(config: Any | None) -> dict[str, Any] | None:
    """The settings that decide what the quantized weights are, as primitives."""
    if config is None:
        return None
    backend = backend_for(config)
    fields = backend.config_to_dict(config)
    # Records of bitsandbytes have never had it.
    return fields if backend.name == bnb_config.NAME else {"quant_method": backend.name, **fields}


def quantization_from_dict(fields: Mapping[str, Any] | None) -> Any | None:
    """The config that :func:`quantization_to_dict` wrote, or that a user wrote as a mapping."""
    if fields is None:
        return None
    backend = _named(fields)[0]
    others = {name: value for name, value in fields.items() if name != "quant_method"}
    return checked_config(backend.config_from_dict(others))


def checked_config(config: Any) -> Any:
    """``config`` itself, if a backend can work with it."""
    backend_for(config).check_config(config)
    return config


def quantization_config(
    config: Any | Mapping[str, Any] | None = None,
    *,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_use_double_quant: bool = True,
    bnb_4bit_compute_dtype: str | None = None,
) -> Any:
    """Fills a ``transformers.BitsAndBytesConfig``, or checks the config of any backend.

    Args:
        config: A ready config of a registered backend, or its fields with a ``quant_method``
            (without one, bitsandbytes); the other arguments are then not looked at.
        load_in_4bit: Four bits per parameter.
        load_in_8bit: Eight bits per parameter instead.
        bnb_4bit_quant_type: ``"nf4"`` or ``"fp4"``.
        bnb_4bit_use_double_quant: Quantize the block constants too (4.127 bits per parameter
            instead of 4.5).
        bnb_4bit_compute_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``None`` follows
            the activations (and so the Trainer's ``precision``).

    Raises:
        ConfigError: If the values cannot work, all of them at once.
        UnsupportedError: If packed codes are to be stored as floats.
    """
    if config is None:
        config = {
            "load_in_4bit": load_in_4bit and not load_in_8bit,
            "load_in_8bit": load_in_8bit,
            "bnb_4bit_quant_type": bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": bnb_4bit_use_double_quant,
            "bnb_4bit_compute_dtype": bnb_4bit_compute_dtype,
        }
    if isinstance(config, Mapping):
        return quantization_from_dict(config)
    return checked_config(config)


def recorded_backend(fields: Mapping[str, Any]) -> Backend:
    """The backend of a recorded quantization."""
    return backend_for(quantization_from_dict(fields))


def _named(fields: Mapping[str, Any]) -> list[Backend]:
    name = fields.get("quant_method") or bnb_config.NAME
    # transformers' own configs hold a member of an enumeration.
    name = str(getattr(name, "value", name))
    found = [backend for backend in _BACKENDS if backend.name == name]
    if not found:
        known = sorted({backend.name for backend in _BACKENDS})
        raise ConfigError(f"quant_method={name!r}: one of {', '.join(known)}.")
    return found

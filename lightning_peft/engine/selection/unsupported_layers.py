"""Layers that cannot be adapted, or not in the requested way, refused before anything changes.

transformers loads some formats of other libraries dense, and bitsandbytes' layers have a backend
here. In the others an adapter would compute with codes as if they were the weight, or be left out.
Gemma 3n clamps the coefficients of AltUp in training, RWKV rescales its outputs in evaluation: a
layer whose weight the model's own code changes stays dense and without an adapter, as what others
see of an adapted or quantized weight is computed, and a change of it would be lost.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.backends.loaded import LoadedFormat
from lightning_peft.engine.backends.registry import (
    backend_for,
    backend_of,
    backends,
    claiming_backend,
    is_quantized,
)
from lightning_peft.engine.layers.kinds import CONVOLUTIONS, is_dilated, pads_with_values
from lightning_peft.engine.layers.mixin import class_key, stored_parameter
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.model_types import fused_kernel_problem
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.selection.parts import inside, matches_suffix
from lightning_peft.errors import UnsupportedError, itemize

_CHANGE = re.compile(r"\b((?:\w+\.)+)weight(?:\.data)?\.[a-z]+_\(")


@dataclass(frozen=True)
class StoredFormat:
    """A format that transformers knows.

    Attributes:
        name: The ``quant_method`` in its config.
        title: What it is called.
        takes: What loading it takes besides transformers and accelerate.
        dense: How transformers loads it with dense weights, on which adapters train; ``None`` where
            it cannot.
        tried: Whether a test loads it that way.
    """

    name: str
    title: str
    takes: str
    dense: str | None = None
    tried: bool = False


_GPU = "a GPU"
_REMEDY = (
    "Load the weights of 16 or 32 bits that they were made from: QLoRAStrategy quantizes those."
)
# By `quant_method`, without bitsandbytes' two, which are backends.
FORMATS = {
    stored.name: stored
    for stored in (
        StoredFormat("gguf", "GGUF", "gguf", "GgufConfig(dequantize=True)", tried=True),
        StoredFormat(
            "fp8", "FP8 in blocks", _GPU, "FineGrainedFP8Config(dequantize=True)", tried=True
        ),
        StoredFormat("mxfp8", "MXFP8", _GPU, "FineGrainedFP8Config(dequantize=True)"),
        StoredFormat(
            "mxfp4",
            "MXFP4 (gpt-oss)",
            "kernels and triton",
            "Mxfp4Config(dequantize=True)",
            tried=True,
        ),
        StoredFormat(
            "compressed-tensors",
            "compressed-tensors: packed integers, int8, float8",
            "compressed-tensors",
            "CompressedTensorsConfig(dequantize=True)",
        ),
        StoredFormat("torchao", "torchao: int8, float8, intx, int4 (plain)", "torchao"),
        StoredFormat("hqq", "HQQ: 1 to 8 bits", "hqq, by its own loader"),
        StoredFormat("gptq", "GPTQ: 2, 3, 4 and 8 bits", "gptqmodel and optimum"),
        StoredFormat("awq", "AWQ", "gptqmodel"),
        StoredFormat("auto-round", "AutoRound", "auto-round"),
        StoredFormat("aqlm", "AQLM", "aqlm"),
        StoredFormat("eetq", "EETQ", f"kernels and {_GPU}"),
        StoredFormat("quanto", "quanto: int8, float8, int4, int2", "optimum-quanto"),
        StoredFormat("bitnet", "BitNet", "nothing"),
        StoredFormat("fbgemm_fp8", "FBGEMM FP8", f"fbgemm-gpu and {_GPU}"),
        StoredFormat("higgs", "HIGGS", f"flute-kernel and {_GPU}"),
        StoredFormat("spqr", "SpQR", f"spqr_quant and {_GPU}"),
        StoredFormat("vptq", "VPTQ", f"vptq and {_GPU}"),
        StoredFormat("fp_quant", "FP-Quant", f"fp_quant and {_GPU}"),
        StoredFormat("quark", "Quark", "amd-quark"),
    )
}


def refuse_stored_formats(module: nn.Module, parts: Iterable[str]) -> None:
    """Refuses models whose weights transformers holds in a format without a backend here."""
    served = {backend.name for backend in backends()}
    problems = []
    for name, child in module.named_modules():
        backend = claiming_backend(child)
        if isinstance(backend, LoadedFormat) and any(not n or inside(name, [n]) for n in parts):
            reason = backend.reading_problem(child) or "it is not inside of a module"
            problems.append(f"{name or type(child).__name__}: {reason}")
        config = getattr(child.__dict__.get("hf_quantizer"), "quantization_config", None)
        method = str(to_primitives(getattr(config, "quant_method", None)))
        meant = any(not n or not name or inside(name, [n]) or inside(n, [name]) for n in parts)
        if config is not None and method not in served and meant:
            known = FORMATS.get(method)
            dense = known.dense if known else None
            problems.append(
                f"{name or type(child).__name__} has weights in {known.title if known else method}"
                + (f"; from_pretrained makes them dense by {dense}" if dense else "")
            )
    if problems:
        raise UnsupportedError(
            "Adapters do not train on weights that another library keeps in a format of its own:"
            + itemize(problems, 5)
            + f"\n{_REMEDY}"
        )


def unread_weights(layers: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each layer whose weight is neither dense nor of a backend here."""
    stored = {name: _unknown_storage(layer) for name, layer in layers.items()}
    return [
        f"{name}: its weight is complex, and PEFT has real factors. Leave it out by "
        "`exclude_modules`"
        if kind.startswith("complex")
        else f"{name}: its weight is stored as {kind}, which an adapter would take for the values. "
        f"{_REMEDY}"
        for name, kind in stored.items()
        if kind is not None
    ]


def _unknown_storage(layer: Any) -> str | None:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = base._parameters.get("weight")
    if weight is None or is_quantized(base) or backend_of(weight) is not None:
        return None
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return str(weight.dtype).removeprefix("torch.")
    kind = type(weight.data)
    own = kind.__module__.partition(".")[0] in ("torch", "lightning_peft")
    return None if own else kind.__name__


def self_modified_layers(part: nn.Module) -> dict[str, str]:
    """Returns the names of such layers, with the class whose code changes them."""
    found: dict[str, str] = {}
    for name, child in part.named_modules():
        origin: Any = class_key(child)[2]
        for suffix in _changed_by(origin):
            inner = [n for n, _ in child.named_modules() if matches_suffix(suffix, n)]
            found |= {f"{name}.{n}".lstrip("."): origin.__name__ for n in inner}
    return found


@cache
def _changed_by(cls: Any) -> tuple[str, ...]:
    """Returns the dotted names, below an instance of ``cls``, of layers that its code changes."""
    if cls.__module__.startswith("torch."):
        return ()
    found = []
    for name, function in vars(cls).items():
        # Initialisation is over when adapters are added.
        if not isinstance(function, FunctionType) or "init" in name or name.startswith("reset"):
            continue
        names = function.__code__.co_names
        if "weight" not in names or not any(n.endswith("_") and n[0] != "_" for n in names):
            continue
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            continue
        found += [path.split(".", 1)[1].rstrip(".") for path in _CHANGE.findall(source)]
    return tuple(dict.fromkeys(filter(None, found)))


def wrapping_problems(
    part: nn.Module,
    targets: list[str],
    quantize: list[str],
    config: PeftConfig,
    quantization: Any | None,
) -> list[str]:
    """Returns where PEFT's wrappers, which replace layers in their parents, would go wrong."""
    names: dict[int, list[str]] = {}
    for name, child in part.named_modules(remove_duplicate=False):
        names.setdefault(id(child), []).append(name)
    readers = {
        name: type(child).__name__
        for name, child in part.named_modules()
        if isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    }
    problems = []
    for target in targets:
        layer = part.get_submodule(target)
        if len(names[id(layer)]) > 1:
            problems.append(
                f"{target} is also called {', '.join(names[id(layer)][1:])}, and PEFT would "
                "replace it under one name"
            )
        unused = fused_kernel_problem(part, target)
        problems += [unused] if unused else []
        reader = next((n for n in readers if n != target and inside(target, [n])), None)
        if reader is not None:
            problems.append(
                f"{target} lies in a {readers[reader]}, which reads weights past PEFT's layers"
            )
        if isinstance(layer, Conv1D) and (target in quantize or is_quantized(layer)):
            problems.append(f"{target} is a quantized Conv1D, which PEFT takes for a Linear")
        if method_of(config).dense_only and (target in quantize or is_quantized(layer)):
            stored = backend_of(stored_parameter(layer))
            backend = stored or backend_for(quantization)
            problems.append(
                f"{target} is quantized, and {type(config).__name__} works on dense weights only. "
                f"Name it in `{backend.skip_argument}`, or do not quantize"
            )
        if isinstance(layer, CONVOLUTIONS):
            problems += [f"{target} {problem}" for problem in _convolution_problems(layer, config)]
    return problems


_Property = Callable[[Any], bool]


def _is_uneven(layer: Any) -> bool:
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    return any(isinstance(size, str) or len(set(size)) > 1 for size in sizes)


_PROPERTIES: dict[str, tuple[_Property, str]] = {
    "padding_mode": (pads_with_values, "padding_mode={layer.padding_mode!r}"),
    "dilation": (is_dilated, "dilation={layer.dilation}"),
    "groups": (lambda layer: layer.groups > 1, "groups={layer.groups}"),
    "uneven": (
        _is_uneven,
        "kernel_size={layer.kernel_size}, stride={layer.stride}, padding={layer.padding!r}, and "
        "uses one number of each",
    ),
}


def _convolution_problems(layer: nn.Module, config: PeftConfig) -> list[str]:
    left_out = [_PROPERTIES[name] for name in method_of(config).ignored_properties]
    return [
        f"has {said.format(layer=layer)}; PEFT's {type(config).__name__} with these settings "
        "computes another convolution. Leave it out by `exclude_modules`, or use plain LoRA"
        for holds, said in left_out
        if holds(layer)
    ]

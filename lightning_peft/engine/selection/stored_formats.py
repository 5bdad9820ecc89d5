"""Quantized formats of other libraries, and their support for adapters.

transformers loads some of them dense, and bitsandbytes' layers have a backend here. In the others
an adapter would compute with codes as if they were the weight, or be left out, so that they are
refused before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.engine.backends.registry import backend_of, backends, is_quantized
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import UnsupportedError, itemize


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
            "compressed-tensors",
            "compressed-tensors",
            "CompressedTensorsConfig(dequantize=True)",
        ),
        StoredFormat("torchao", "torchao int4, int8, float8", "torchao"),
        StoredFormat("hqq", "HQQ", "hqq"),
        StoredFormat("gptq", "GPTQ", "gptqmodel and optimum"),
        StoredFormat("awq", "AWQ", "gptqmodel"),
        StoredFormat("auto-round", "AutoRound", "auto-round"),
        StoredFormat("aqlm", "AQLM", "aqlm"),
        StoredFormat("eetq", "EETQ", f"kernels and {_GPU}"),
        StoredFormat("quanto", "Quanto", "optimum-quanto"),
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
            + itemize(problems)
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

"""Small language models in formats of several tensors per layer, written as their libraries do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

# AQLM's kernel for CPUs adds to the same numbers in all of its threads.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
Load = Callable[[], Any]
Make = Callable[[Path], Load]
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_GROUP = 32


def dense(folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    torch.manual_seed(0)
    config = llama_config(hidden_size=128, intermediate_size=160, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def hqq(bits: int, axis: int) -> Make:
    def make(folder: Path) -> Load:
        core = pytest.importorskip("hqq.core.quantize")
        from hqq.models.hf.base import AutoHQQHFModel

        model = LlamaForCausalLM.from_pretrained(dense(folder / "dense", torch.float32))
        config = core.BaseQuantizeConfig(nbits=bits, group_size=_GROUP, axis=axis)
        given = {"compute_dtype": torch.float32, "device": "cpu"}
        AutoHQQHFModel.quantize_model(model, config, **given)
        stored = str(folder / "stored")
        AutoHQQHFModel.save_quantized(model, stored)
        return lambda: AutoHQQHFModel.from_quantized(stored, **given)

    return make


def _words(values: Tensor, bits: int) -> Tensor:
    """Packs numbers along the last dimension, by Python's integers."""
    rows = []
    for row in values.tolist():
        whole = sum(value << bits * place for place, value in enumerate(row))
        rows.append(list(whole.to_bytes(len(row) * bits // 8, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int32)


def _codes(weight: Tensor, bits: int, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``(out, in)``, and scales and zeros ``(out, groups)``."""
    groups = int(order.max()) + 1
    parts = [weight[:, order == group].float() for group in range(groups)]
    low = torch.stack([part.amin(1) for part in parts], 1)
    high = torch.stack([part.amax(1) for part in parts], 1)
    scales = ((high - low) / ((1 << bits) - 1)).half()
    zeros = (-low / scales).round().clamp(1, (1 << bits) - 1).long()
    codes = (weight.float() / scales[:, order] + zeros[:, order]).round().long()
    return codes.clamp(0, (1 << bits) - 1), scales, zeros


def packed(config: dict[str, Any], loaded_by: Any = None, needs: str = "gptqmodel") -> Make:
    """A checkpoint with words of 32 bits, which GPTQ, AWQ and AutoRound share."""
    bits, method = config["bits"], config["quant_method"]

    def make(folder: Path) -> Load:
        pytest.importorskip(needs)
        state = load_file(dense(folder / "dense") / "model.safetensors")
        stored = {}
        for name, weight in state.items():
            if not name.endswith("_proj.weight"):
                stored[name] = weight
                continue
            order = torch.arange(weight.shape[1]) // _GROUP
            if config.get("desc_act"):
                order = order[torch.randperm(len(order))]
            codes, scales, zeros = _codes(weight, bits, order)
            held = {"scales": scales.t().contiguous()}
            if method == "awq":
                along, zeros = codes.t(), zeros.t()
                if bits == 4:
                    along = along.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)
                    zeros = zeros.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)
                held |= {"qweight": _words(along, bits), "qzeros": _words(zeros, bits)}
            else:
                raw = config.get("checkpoint_format") == "gptq_v2"
                less = zeros.t() - int(not raw and config.get("packing_format") != "auto_round")
                held |= {"qweight": _words(codes, bits).t().contiguous()}
                held |= {"qzeros": _words(less, bits)}
                if method == "gptq":
                    held |= {"g_idx": order.int()}
            stored |= {name.replace("weight", key): one for key, one in held.items()}
        save_file(stored, folder / "dense" / "model.safetensors", {"format": "pt"})
        path = folder / "dense" / "config.json"
        described = json.loads(path.read_text())
        path.write_text(json.dumps({**described, "quantization_config": config}))
        given = {} if loaded_by is None else {"quantization_config": loaded_by()}
        return lambda: AutoModelForCausalLM.from_pretrained(folder / "dense", **given)

    return make


def gptq(bits: int, **given: Any) -> Make:
    config = {"quant_method": "gptq", "bits": bits, "group_size": _GROUP, "sym": False, **given}
    return packed(
        {"desc_act": False, "checkpoint_format": "gptq", **config},
        lambda: GPTQConfig(bits=bits, backend="gptq_torch"),
    )


def awq(bits: int) -> Make:
    config = {"quant_method": "awq", "bits": bits, "group_size": _GROUP, "zero_point": True}
    given = {"format": "gemm", "version": "gemm", "backend": "torch_awq", "sym": False}
    return packed({**config, **given})


def auto_round(bits: int, raw_zeros: bool) -> Make:
    config = {"quant_method": "auto-round", "bits": bits, "group_size": _GROUP}
    layout = "auto_round" if raw_zeros else "auto_round:auto_gptq"
    given = {"packing_format": layout, "sym": not raw_zeros, "data_type": "int"}
    return packed({**config, **given, "backend": "torch"}, needs="auto_round")


def aqlm(bits: int, books: int) -> Make:
    def make(folder: Path) -> Load:
        library = pytest.importorskip("aqlm")
        from aqlm.utils import pack_int_data

        kinds = {"num_codebooks": books, "nbits_per_codebook": bits}
        config = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, **kinds}
        left = ["lm_head.weight", "lm_head"]
        state = load_file(dense(folder / "dense", torch.float32) / "model.safetensors")
        stored = {}
        for name, weight in state.items():
            if not name.endswith("_proj.weight"):
                stored[name] = weight
                continue
            out, columns = weight.shape
            layer = library.QuantizedLinear(columns, out, 8, 1, books, bits, bias=False)
            codes = torch.randint(0, 1 << bits, layer.codes.shape)
            held = {
                "codes": pack_int_data(codes, bits),
                "codebooks": torch.randn(layer.codebooks.shape) * 0.05,
                "scales": torch.rand(layer.scales.shape) + 0.5,
            }
            stored |= {name.replace("weight", key): one for key, one in held.items()}
        save_file(stored, folder / "dense" / "model.safetensors", {"format": "pt"})
        path = folder / "dense" / "config.json"
        described = json.loads(path.read_text())
        config["linear_weights_not_to_quantize"] = left
        path.write_text(json.dumps({**described, "quantization_config": config}))
        return lambda: AutoModelForCausalLM.from_pretrained(folder / "dense")

    return make


# By format, with bytes per weight including scales.
CASES: dict[str, tuple[Make, float]] = {
    "hqq-8": (hqq(8, 1), 1.3),
    "hqq-4": (hqq(4, 1), 0.8),
    "hqq-4-outputs": (hqq(4, 0), 0.8),
    "hqq-3": (hqq(3, 1), 0.7),
    "hqq-2": (hqq(2, 1), 0.6),
    "hqq-1": (hqq(1, 1), 0.4),
    "gptq-8": (gptq(8), 1.2),
    "gptq-4": (gptq(4), 0.65),
    "gptq-4-order": (gptq(4, desc_act=True), 0.7),
    "gptq-4-v2": (gptq(4, checkpoint_format="gptq_v2"), 0.65),
    "gptq-3": (gptq(3), 0.55),
    "gptq-2": (gptq(2), 0.45),
    "awq-4": (awq(4), 0.65),
    "auto-round-4": (auto_round(4, True), 0.65),
    "auto-round-3": (auto_round(3, False), 0.55),
    "aqlm-8": (aqlm(8, 2), 2.4),
    "aqlm-12": (aqlm(12, 1), 17.0),
}

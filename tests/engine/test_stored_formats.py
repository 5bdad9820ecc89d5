"""Weights in formats of other libraries: loaded dense by transformers, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import stack, tiny_llama, token_batch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    Mxfp4Config,
)

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import UnsupportedError

from .reference import injected, output_of, randomize, refused, relative_error

BLOCK = 128


def saved_as(folder: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Writes a tiny Llama whose config says that it is quantized; returns its tensors."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return load_file(folder / "model.safetensors")


def in_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Writes a tiny Llama in FP8 by blocks; returns the values that this stands for, by name."""
    tensors = saved_as(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    stored, meant = {}, {}
    for name, value in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        # Each matrix is smaller than one block.
        assert max(value.shape) <= BLOCK
        scale = value.abs().max() / 448
        stored[name] = (value / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        meant[name] = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def dense(folder: Path) -> LlamaForCausalLM:
    """Loads a Llama in FP8 with dense weights, on any device."""
    config = FineGrainedFP8Config(dequantize=True)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def test_fp8_is_loaded_dense_and_trains(tmp_path: Path) -> None:
    meant, batch = in_fp8(tmp_path / "base"), token_batch()
    base = dense(tmp_path / "base")
    weights = dict(base.named_parameters())
    assert all(relative_error(weights[name], value) < 1e-2 for name, value in meant.items())
    model = injected(base, r=4)
    randomize(model)
    output_of(model, batch).square().sum().backward()
    assert all(p.grad is not None for p in engine.adapter_parameters(model).values())
    expected = output_of(model, batch).detach()
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    again = dense(tmp_path / "base")
    lightning_peft.load_adapter(again, tmp_path / "adapter")
    assert output_of(again, batch).equal(expected)
    lightning_peft.merge(again)
    assert relative_error(output_of(again, batch), expected) < 1e-5
    four = dense(tmp_path / "base")
    lightning_peft.inject(four, r=4, quantization_config=engine.quantization_config())
    assert lightning_peft.report(four).parts[0].quantized == 14


# The magnitudes of four bits with two of exponent and one of mantissa.
FOUR_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_mxfp4_is_loaded_dense_and_trains(tmp_path: Path) -> None:
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 61}
    config = GptOssConfig(
        **tokens, **heads, **sizes, num_local_experts=4, layer_types=["full_attention"]
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tensors, meant = load_file(tmp_path / "model.safetensors"), {}
    values = torch.tensor([*FOUR_BITS, *(-one for one in FOUR_BITS)])
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.full(blocks.shape[:3], 121, dtype=torch.uint8)
        pairs = torch.stack([values[blocks.int() & 15], values[blocks.int() >> 4]], -1)
        meant[name] = (pairs.reshape(experts, rows, columns) * 2.0 ** (121 - 127)).mT
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = json.loads((tmp_path / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    dense = Mxfp4Config(dequantize=True)
    model = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=dense
    )
    weights = dict(model.named_parameters())
    assert all(weights[name].equal(value) for name, value in meant.items())
    injected(model, r=4, target_modules=["q_proj", "v_proj"])
    randomize(model)
    output_of(model, token_batch()).square().sum().backward()
    assert all(p.grad is not None for p in engine.adapter_parameters(model).values())


def test_a_format_without_a_handler_is_refused(tmp_path: Path) -> None:
    settings = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    saved_as(tmp_path, {"quant_method": "bitnet", **settings})
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    module = nn.ModuleDict({"model": model, "side": nn.Sequential(nn.Linear(4, 4))})
    with refused(module, UnsupportedError, r"model has weights in BitNet(.|\n)*16 or 32 bits"):
        lightning_peft.inject(module, r=4, adapt="model.model")
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has weights in BitNet"):
        lightning_peft.inject(model, r=4)
    # What does not belong to it trains.
    lightning_peft.inject(module, r=4, adapt="side", target_modules=["0"])


class Packed(torch.Tensor):
    """Stands for the tensor classes by which libraries keep packed weights."""


CODES = {
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "first: its weight is stored as float8_e4m3fn"),
    "int8": (lambda w: w.mul(100).to(torch.int8), "first: its weight is stored as int8"),
    "class": (lambda w: w.as_subclass(Packed), "first: its weight is stored as Packed"),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_not_taken_for_weights(kind: str) -> None:
    change, message = CODES[kind]
    model = stack()
    model.first.weight = nn.Parameter(change(model.first.weight.data), requires_grad=False)
    with refused(model, UnsupportedError, message):
        lightning_peft.inject(model, r=4, target_modules=["first"])

"""Models of experts are merged file by file, also where their files hold each expert apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_models import CONFIGS, model_of
from finished import BASE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralModel

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import CheckpointError, UnsupportedError
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.card import dense_experts
from lightning_peft.export.formats import as_quantized
from lightning_peft.export.merged_folder import base_of
from lightning_peft.export.merging import merge
from lightning_peft.export.request import ExportRequest

from .test_merged_folder import NF4, in_memory, merged, peak_bytes, randomize

LONG = pytest.mark.long
IDS = torch.arange(3, 27).view(2, 12)


def adapter_on(base: Path, folder: Path, **settings) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    lightning_peft.inject(model, r=2, **settings)
    randomize(model)
    lightning_peft.save_adapter(model, folder)
    return model


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k == "mixtral" else LONG) for k in CONFIGS],
)
def test_a_merged_folder_is_what_merging_in_memory_gives(kind: str, bits: int, tmp_path) -> None:
    model_of(kind).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    settings = {"quantization_config": NF4} if bits == 4 else {}
    model = adapter_on(tmp_path / "base", tmp_path / "adapter", **settings)
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    assert result.base_checked
    assert result.into == ("dequantized" if bits == 4 else "original")
    layers = engine.adapted_layers(model)
    assert sorted(one.name for one in result.weights) == sorted(layers)
    before, after = weights_in(tmp_path / "base"), weights_in(tmp_path / "out")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert any(".experts.3." in key for key in after) == (kind not in ("gpt-oss", "llama4"))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = in_memory(model, torch.float32)
    found = written.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(written(IDS).logits, model(IDS).logits)


@LONG
def test_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    config = CONFIGS["qwen3"]
    config = type(config)(
        **config.to_dict()
        | {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 12}
    )
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="500KB")
    shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = 2 * sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    model = adapter_on(base, tmp_path / "adapter", quantization_config=NF4)
    factors = sum(4 * p.numel() for p in engine.adapter_parameters(model).values())
    del model
    peak = peak_bytes(lambda: merged(tmp_path / "adapter", tmp_path / "out"))
    # A mapped shard, some float32 copies of all experts of a block, and the adapter.
    assert peak < shard + 11 * 4 * largest + 4 * factors
    assert peak < total


def test_files_of_a_model_without_its_head_lack_the_prefix(tmp_path: Path) -> None:
    model_of("mixtral").model.save_pretrained(tmp_path / "base")
    model = MixtralModel.from_pretrained(tmp_path / "base").eval()
    lightning_peft.inject(model, r=2)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    assert weights_in(tmp_path / "out").keys() == weights_in(tmp_path / "base").keys()
    written = MixtralModel.from_pretrained(tmp_path / "out").eval()
    expected = in_memory(model, torch.float32)
    assert all(torch.equal(written.state_dict()[name], one) for name, one in expected.items())
    # With the head of another class, whose names have the prefix, the adapter brings the head.
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    lightning_peft.inject(other, r=2, modules_to_save=["lm_head"])
    randomize(other)
    lightning_peft.save_adapter(other, tmp_path / "headed")
    merged(tmp_path / "headed", tmp_path / "headed-out", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "headed-out").eval()
    expected = in_memory(other, torch.float32)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in expected.items())


def test_an_adapter_of_plain_peft_and_a_trained_router(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"],
        modules_to_save=["mlp.gate"], init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(base, config).eval()
    for name, param in theirs.named_parameters():
        if "modules_to_save" in name:
            param.data += 0.1
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(IDS).logits
    merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(out(IDS).logits, expected, rtol=1e-5, atol=1e-5)


FAULTS = {
    "absent": (CheckpointError, r"its 6 tensors .* make \(3, "),
    "dtype": (UnsupportedError, r"they differ in dtype .*In Python, with the whole model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_make_the_model(fault: str, tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path / "base")
    adapter_on(tmp_path / "base", tmp_path / "adapter")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(file)
    key = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    if fault == "absent":
        for one in ("w1", "w2", "w3"):
            del tensors[key.replace("w1", one)]
    else:
        tensors[key] = tensors[key].half()
    save_file(tensors, file, metadata={"format": "pt"})
    error, message = FAULTS[fault]
    with pytest.raises(error, match="(?s)" + message):
        merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    """Returns the folder of a base with a tokenizer."""
    config = MixtralConfig(
        **CONFIGS["mixtral"].to_dict() | {"vocab_size": 4096, "hidden_size": 128}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("into", ["dequantized", pytest.param("original", marks=LONG)])
def test_outputs_are_compared(into: str, with_tokenizer: Path, tmp_path: Path) -> None:
    adapter_on(with_tokenizer, tmp_path / "adapter", quantization_config=NF4)
    report = merge(
        str(tmp_path / "adapter"), tmp_path / "out", into=into, prompts=["one prompt"],
        dtype="float32",
    )  # fmt: skip
    assert report["not_measured"] is None
    errors = report["logit_errors"]
    assert errors["dequantized"]["relative"] < 1e-5
    assert errors["original"]["relative"] > 0.01
    assert errors["requantized"]["relative"] > 0.01


@LONG
def test_experts_of_a_quantized_folder_stay_dense(with_tokenizer: Path, tmp_path: Path) -> None:
    adapter_on(with_tokenizer, tmp_path / "adapter")
    found = find_adapter(str(tmp_path / "adapter"))
    options = {"prompts": ["one"]}
    request = ExportRequest(found, base_of(found), tmp_path / "out", None, options, bits=4)
    report = as_quantized(request)
    size = 2 * 2 * 4 * 3 * 48 * 128
    assert report["quantized"]["dense_expert_bytes"] == size
    assert report["notes"] == [dense_experts(size)]
    assert dense_experts(size) in (tmp_path / "out" / "README.md").read_text()
    assert report["quantized"]["not_measured"] is None
    assert report["quantized"]["logit_error"]["relative"] < 0.5

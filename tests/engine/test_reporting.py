"""The report counts what there is, to the weight and to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
from models import stack, tiny_llama
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.registry import storage_bytes

from .reference import injected

NF4 = engine.quantization_config(bnb_4bit_use_double_quant=False)


def test_bytes_of_a_stack_by_hand() -> None:
    model = injected(stack(), r=4)
    report = lightning_peft.report(model)
    base = 4 * (96 * 64 + 64 + 64 * 96 + 96)
    assert report.base_bytes == report.dense_base_bytes == base
    assert report.trainable_bytes == 4 * report.trainable_parameters
    quantized = injected(stack(), r=4, quantization_config=NF4)
    report = lightning_peft.report(quantized)
    # Half a byte per weight, and a float32 constant for each block of 64.
    weights = 2 * (96 * 64 // 2 + 4 * (96 * 64 // 64))
    assert report.base_bytes == weights + 4 * (64 + 96)
    assert report.dense_base_bytes == base
    assert report.total_parameters == sum(p.numel() for p in stack().parameters()) + 1280


def test_bytes_are_those_of_the_tensors() -> None:
    for settings in ({}, {"quantization_config": NF4}, {"modules_to_save": ["lm_head"]}):
        model = tiny_llama()
        report = lightning_peft.inject(model, r=4, **settings)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert report.base_bytes == sum(storage_bytes(p) for p in frozen)


def test_a_merged_base_is_dense_again() -> None:
    model = stack()
    before = lightning_peft.inject(model, r=4, quantization_config=NF4)
    lightning_peft.merge(model)
    after = lightning_peft.report(model)
    assert after.base_bytes == after.dense_base_bytes == before.dense_base_bytes


def test_layers_that_came_quantized_count_as_they_came() -> None:
    import bitsandbytes as bnb

    model = stack()
    model.first = bnb.nn.LinearNF4(96, 64).to("cpu")
    report = lightning_peft.inject(model, r=4, quantization_config=NF4)
    assert report.parts[0].quantized == 2
    came = storage_bytes(model.first._parameters["weight"])
    assert report.dense_base_bytes == came + 4 * (64 * 96 + 64 + 96)


def test_what_is_said_of_each_part() -> None:
    module = nn.ModuleDict({"model": stack(), "other": nn.Linear(5, 5)})
    settings = {"target_modules": ["first"], "modules_to_save": ["second"], "use_rslora": True}
    report = lightning_peft.inject(module, r=4, adapt="model", **settings)
    part = report.parts[0]
    assert (part.name, part.method) == ("model", "rsLoRA r=4 alpha=8")
    assert (part.adapted, part.saved) == ({"first": 1}, ["second"])
    assert part.heads == {"head": "trainable"}
    assert report.outside == 30
    assert report.trainable_parameters == 4 * 160 + (64 * 96 + 96) + (96 * 10 + 10) + 30


@pytest.mark.parametrize(
    ("settings", "method"),
    [({}, "LoRA r=4 alpha=8"), ({"use_dora": True, "lora_alpha": 2.5}, "DoRA r=4 alpha=2.5")],
)
def test_methods_by_name(settings: dict, method: str) -> None:
    assert lightning_peft.inject(stack(), r=4, **settings).parts[0].method == method


def test_other_methods_by_their_type() -> None:
    report = lightning_peft.inject(stack(), {"peft_type": "LOHA", "r": 2})
    assert report.parts[0].method == "LOHA"
    assert not report.parts[0].in_place
    assert "in PEFT's wrappers" in str(report)


def test_text_has_the_numbers_and_fits_a_terminal() -> None:
    model = stack()
    text = str(lightning_peft.inject(model, r=4, quantization_config=engine.quantization_config()))
    assert "trainable 2,250 of 14,698 parameters (15.31 %), 1,280 of them in adapters" in text
    assert "nf4, double quantization" in text
    assert "head (trainable)" in text
    assert "(before quantization" in text
    assert max(map(len, text.splitlines())) <= 120


def test_show_prints(capsys: pytest.CaptureFixture[str]) -> None:
    engine.show(lightning_peft.inject(stack(), r=4))
    assert "LoRA r=4 alpha=8" in capsys.readouterr().out


def test_quantization_by_name() -> None:
    labels = {
        "nf4": engine.quantization_config(bnb_4bit_use_double_quant=False),
        "fp4, double quantization": engine.quantization_config(bnb_4bit_quant_type="fp4"),
        "int8": engine.quantization_config(load_in_8bit=True),
    }
    for label, config in labels.items():
        report = lightning_peft.inject(stack(), r=4, quantization_config=config)
        assert report.parts[0].quantization == label


def test_tied_weights_count_once() -> None:
    model = tiny_llama(tied=True)
    count = sum(p.numel() for p in model.parameters())
    report = lightning_peft.inject(model, r=4)
    assert report.total_parameters == count + report.adapter_parameters
    assert report.base_bytes == 4 * count
    assert report.parts[0].name == "LlamaForCausalLM"
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_what_stays_dense_under_quantization_is_said() -> None:
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    skipped = engine.quantization_config()
    skipped.llm_int8_skip_modules = ["experts"]
    report = lightning_peft.inject(MixtralForCausalLM(config), r=4, quantization_config=skipped)
    (part,) = report.parts
    assert part.dense["experts.gate_up_proj"] == 4 * 2 * 4 * 64 * 32
    assert part.dense["experts.down_proj"] == 4 * 2 * 4 * 32 * 32
    assert part.dense["lm_head"] == part.dense["embed_tokens"] == 4 * 61 * 32
    assert "kept dense" in str(report)
    assert "experts.gate_up_proj 0.1 MB" in str(report)
    assert lightning_peft.inject(stack(), r=4).parts[0].dense == {}


def test_copies_that_follow_are_named() -> None:
    module = nn.ModuleDict({"net": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    module["slow"] = copy.deepcopy(module["net"]).requires_grad_(False)
    report = lightning_peft.inject(module, r=2, target_modules=["net", "slow"])
    assert report.parts[0].follows == {"slow": "net"}
    assert "slow (of net)" in str(report)

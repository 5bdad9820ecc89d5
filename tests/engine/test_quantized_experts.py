"""Weights of experts as 4-bit codes: the same numbers, and only those of experts in use."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise
from expert_models import model_of
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.bnb4 import FOUR_BIT
from lightning_peft.engine.backends.layers import QuantizedExperts
from lightning_peft.engine.backends.registry import storage_bytes
from lightning_peft.engine.layers.expert_weights import ExpertWeight, RoutedExperts
from lightning_peft.errors import BaseMismatchError, CheckpointError

from .reference import injected, output_of, randomize, relative_error
from .test_experts import IDS, LONG, PARAMETERS, RUNS

NF4 = engine.quantization_config()
# Products of bitsandbytes with linear layers round, and another expert is chosen then.
EXPERTS_ALONE = engine.quantization_config()
EXPERTS_ALONE.llm_int8_skip_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH = {"input_ids": IDS}


def without_experts():
    config = engine.quantization_config()
    config.llm_int8_skip_modules = ["experts"]
    return config


def quantized(kind="qwen3", way="grouped_mm", **settings):
    model = injected(
        model_of(kind, way),
        **{"r": 2, "quantization_config": EXPERTS_ALONE, "target_modules": ["q_proj"], **settings},
    )
    randomize(model)
    return model


def dense_copy(model, kind="qwen3", way="grouped_mm"):
    """Returns a model of dense weights with what the codes of ``model`` stand for, and adapters."""
    plain = model_of(kind, way)
    layers = {n: x for n, x in model.named_modules() if hasattr(x, "weight_info")}
    with engine.exposed_experts(plain), torch.no_grad(), lightning_peft.disable_adapters(model):
        for name, layer in layers.items():
            stored = plain.get_submodule(name)._parameters["weight"]
            stored.copy_(layer.effective_weight())
    injected(plain, r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
    state = engine.trainable_state_dict(model)
    engine.load_trainable_state_dict(plain, state)
    return plain


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(6, 48, 128), (4, 16, 32), (3, 5, 30)])
def test_rows_of_one_expert_are_those_that_were_quantized(double, shape):
    config = engine.quantization_config(bnb_4bit_use_double_quant=double)
    experts, height, width = shape
    stored = FOUR_BIT.quantize(torch.randn(experts * height, width), config, torch.device("cpu"))
    state, octets = stored.quant_state, stored.data.view(-1).long()
    constants = state.absmax
    if double:
        constants = dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = torch.stack([state.code[octets >> 4], state.code[octets & 15]], 1).view(-1)
    count = experts * height * width
    every = (numbers[:count] * constants.repeat_interleave(64)[:count]).view(-1, width)
    for start in range(0, experts * height, height):
        part = FOUR_BIT.dequantize_rows(stored, start, start + height)
        assert torch.equal(part, every[start : start + height])
    assert FOUR_BIT.dequantize_rows(stored, 1, 3, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "way"), RUNS)
def test_outputs_and_gradients_are_those_of_the_dequantized_weights(kind, way):
    model = quantized(kind, way, target_parameters=PARAMETERS)
    plain = dense_copy(model, kind, way)
    for one in (model, plain):
        output_of(one, BATCH).pow(2).mean().backward()
    assert relative_error(output_of(model, BATCH), output_of(plain, BATCH)) < 1e-5
    theirs = dict(plain.named_parameters())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 + 4)
    for name, param in trained.items():
        assert relative_error(param.grad, theirs[name].grad) < 1e-4, name


def test_only_experts_in_use_are_dequantized(monkeypatch):
    model = quantized(target_parameters=[])
    asked = []
    original = type(FOUR_BIT).dequantize_rows

    def watched(self, stored, start, end, dtype=None):
        asked.append((id(stored), start))
        return original(self, stored, start, end, dtype)

    monkeypatch.setattr(type(FOUR_BIT), "dequantize_rows", watched)
    monkeypatch.setattr(QuantizedExperts, "effective_weight", None)
    output_of(model, {"input_ids": IDS[:1, :1]}).sum()
    # One token, two experts of four, two weights, two blocks.
    assert len(asked) == len(set(asked)) == 2 * 2 * 2


def test_the_bytes_of_codes_are_those_of_the_plan():
    model = model_of()
    report = lightning_peft.inject(model, r=2, quantization_config=NF4)
    layers = [x for x in model.modules() if isinstance(x, ExpertWeight)]
    assert len(layers) == 4
    for layer in layers:
        stored = layer.owner._parameters[layer.parameter_name]
        held = sum(x.numel() * x.element_size() for x in (stored, *FOUR_BIT.constants(stored)))
        assert held == FOUR_BIT.stored_bytes(layer.weight_info()[0].numel(), NF4)
    assert "experts.gate_up_proj" not in report.parts[0].dense


@pytest.mark.parametrize("kind", [pytest.param("dense layer", marks=LONG), "gpt-oss"])
def test_quantized_experts_are_merged_and_come_back(kind):
    model = quantized(kind, target_modules=None)
    codes = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    assert {n.rpartition(".")[2] for n in codes} >= {"gate_up_proj", "down_proj"}
    expected = output_of(model, BATCH)
    report = lightning_peft.merge(model)
    assert report.worst_error < 1e-6
    assert relative_error(output_of(model, BATCH), expected) < 1e-5
    lightning_peft.unmerge(model)
    assert relative_error(output_of(model, BATCH), expected) < 1e-5
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert not any(isinstance(x, (ExpertWeight, RoutedExperts)) for x in model.modules())
    assert all(p.is_floating_point() for p in model.parameters())
    assert relative_error(output_of(model, BATCH), expected) < 1e-5


def test_quantized_experts_are_copied_pickled_and_verified():
    model = quantized(target_parameters=PARAMETERS)
    expected = output_of(model, BATCH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(other, BATCH), expected)
    assert engine.trainable_state_dict(model).keys() == engine.adapter_parameters(model).keys()
    result = engine.verify(model, {**BATCH, "labels": IDS})
    assert result.passed, str(result)


def test_experts_named_to_be_skipped_stay_dense():
    model = injected(model_of(), r=2, quantization_config=without_experts())
    experts = model.model.layers[0].mlp.experts
    assert experts._parameters["down_proj"].dtype == torch.float32
    assert not any(isinstance(x, QuantizedExperts) for x in model.modules())
    assert engine.record_of(model).parts[""].quantized


def test_folders_keep_experts_as_they_were_in_training(tmp_path):
    model = quantized(quantization_config=without_experts())
    lightning_peft.save_adapter(model, tmp_path)
    # As versions wrote it that could not quantize experts.
    written = tmp_path / "provenance.json"
    facts = json.loads(written.read_text())
    facts["quantization"].pop("llm_int8_skip_modules")
    written.write_text(json.dumps(facts))
    fresh = model_of()
    lightning_peft.load_adapter(fresh, tmp_path, quantization_config=NF4)
    assert not any(isinstance(x, QuantizedExperts) for x in fresh.modules())
    assert torch.equal(output_of(fresh, BATCH), output_of(model, BATCH))
    match = "on a quantized base with dense experts, and the experts of this module are quantized"
    with pytest.raises(BaseMismatchError, match=match):
        lightning_peft.load_adapter(quantized(), tmp_path, adapter_name="other")
    lightning_peft.save_adapter(quantized(quantization_config=NF4), tmp_path / "codes")
    with pytest.raises(BaseMismatchError, match="with quantized experts, and the .* are dense"):
        lightning_peft.load_adapter(fresh, tmp_path / "codes", adapter_name="other")
    lightning_peft.load_adapter(model_of(), tmp_path / "codes")


def test_runs_of_before_go_on_without_quantized_experts():
    described = engine.describe(quantized(quantization_config=without_experts()))
    described["parts"][""]["quantization"].pop("llm_int8_skip_modules")
    engine.check_description(quantized(quantization_config=without_experts()), described)
    match = r"dense in the checkpoint and quantized now\. llm_int8_skip_modules=\['experts'\] in"
    with pytest.raises(CheckpointError, match=match):
        engine.check_description(quantized(quantization_config=NF4), described)


def test_state_dicts_have_the_constants():
    model = quantized()
    state = model.state_dict()
    experts = model.model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {key: state[f"{name}.{key}"] for key in FOUR_BIT.state_tensors(
        experts._parameters["down_proj"]) if key != "codes"}  # fmt: skip
    again = FOUR_BIT.from_state_tensors({"codes": state[name], **tensors}, torch.device("cpu"))
    layer = experts.down_proj_per_expert
    assert torch.equal(
        FOUR_BIT.dequantize_rows(again, 0, 128).view(4, 32, 16), layer.effective_weight()
    )
    left = engine.drop_frozen_base(model, state)
    assert left.keys() == engine.trainable_state_dict(model).keys()


def test_loading_leaves_experts_dense_where_they_were(tmp_path):
    model_of().save_pretrained(tmp_path)
    with engine.quantize_on_load(NF4, torch.device("cpu"), [], dense_experts=True) as loading:
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loading.layers
    assert not any(isinstance(x, ExpertWeight) for _, x in loading.layers)


def test_loading_quantizes_experts_as_they_are_read(tmp_path):
    model_of().save_pretrained(tmp_path)

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()

    after = injected(load(), r=2, quantization_config=NF4)
    with engine.quantize_on_load(NF4, torch.device("cpu"), []) as loading:
        model = load()
    assert sum(isinstance(x, ExpertWeight) for _, x in loading.layers) == 4
    injected(model, r=2, quantization_config=NF4)
    theirs = dict(after.named_parameters())
    for name, param in model.named_parameters():
        if param.dtype == torch.uint8:
            assert torch.equal(param, theirs[name]), name
    assert engine.record_of(model).parts[""].base == engine.record_of(after).parts[""].base


@pytest.mark.parametrize("blocks", [2, pytest.param(48, marks=LONG)])
def test_the_plan_of_qwen3_30b_a3b_is_its_bytes(blocks):
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=[])
    names = engine.inject_on_meta(model, lora, NF4)
    for name in names:
        engine.quantize_on_meta(model.get_submodule(name), NF4)
    assert len(names) == 6 * blocks
    experts, attention = 128 * 768 * 2048, 2048 * 128
    weights = [2 * experts, experts, *(heads * attention for heads in (32, 4, 4, 32))]
    codes = blocks * sum(FOUR_BIT.stored_bytes(count, NF4) for count in weights)
    dense = 2 * (2 * 151936 * 2048 + 2048 + blocks * (128 * 2048 + 2 * 2048 + 2 * 128))
    held = {id(p) for p in engine.all_adapter_parameters(model)}
    assert sum(storage_bytes(p) for p in model.parameters() if id(p) not in held) == codes + dense
    # A 16-bit base has 61 GB.
    assert blocks < 48 or codes + dense == pytest.approx(16.7e9, rel=0.01)

"""A method that lives in one file of the tests does in place everything that LoRA does."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from toy_backend import ToyConfig
from toy_method import SCALING, ScaledLinear

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.files.adapter_format import differences_in_peft
from lightning_peft.engine.methods.registry import METHODS
from lightning_peft.errors import UnsupportedError

from .reference import (
    copy_adapter,
    merged_by_weight,
    output_of,
    peft_model,
    randomize,
    relative_error,
)

BATCH = {"input_ids": torch.arange(14).view(2, 7) % 61}
BASES = {
    "dense": None,
    "nf4": engine.quantization_config(),
    "int8": engine.quantization_config(load_in_8bit=True),
    "toy": ToyConfig(),
}


@pytest.fixture(autouse=True)
def _scaling(monkeypatch):
    monkeypatch.setitem(METHODS, "IA3", METHODS["IA3"])
    engine.register_method(SCALING)


def config(**changes) -> IA3Config:
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return IA3Config(**targets | changes)


def adapted(build=tiny_llama, quantization=None, config=config, trained=True) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    lightning_peft.inject(model, config(), quantization_config=quantization)
    if trained:
        randomize(model)
    return model


def test_the_numbers_are_those_of_peft():
    torch.manual_seed(0)
    reference = peft_model(tiny_llama(), config())
    model = adapted()
    assert copy_adapter(model, reference) == 4
    assert relative_error(output_of(model, BATCH), output_of(reference, BATCH)) < 1e-6
    grads = []
    for one in (model, reference):
        output_of(one, BATCH).float().pow(2).mean().backward()
        grads.append([p.grad for n, p in one.named_parameters() if "ia3_l" in n])
    for mine, theirs in zip(*grads, strict=True):
        assert relative_error(mine, theirs) < 1e-5


def test_layers_stay_and_the_report_names_the_method():
    model = adapted(trained=False)
    scaled = [n for n, x in model.named_modules() if isinstance(x, ScaledLinear)]
    assert len(scaled) == 4
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert "(IA)^3" in str(lightning_peft.report(model))
    assert "in PEFT's wrappers" not in str(lightning_peft.report(model))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {f"{name}.ia3_l.default" for name in scaled}


@pytest.mark.parametrize("base", BASES)
def test_it_trains_and_passes_the_verification(base):
    model = adapted(quantization=BASES[base], trained=False)
    result = lightning_peft.verify(model, token_batch())
    assert result.passed, str(result)
    assert "no effect before training: loss differs by 0 from the base's" in str(result)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = output_of(model, BATCH).float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("base", BASES)
def test_merging_is_exact_and_comes_back(base):
    model = adapted(quantization=BASES[base])
    expected = output_of(model, BATCH)
    with lightning_peft.disable_adapters(model):
        assert relative_error(output_of(model, BATCH), expected) > 0.01
    report = lightning_peft.merge(model)
    assert len(report.layers) == 4
    assert report.worst_error < 1e-6
    assert relative_error(output_of(model, BATCH), expected) < (0.02 if base == "int8" else 1e-5)
    lightning_peft.unmerge(model)
    assert relative_error(output_of(model, BATCH), expected) < 1e-6
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert not [name for name, _ in model.named_parameters() if "ia3" in name]


@pytest.mark.parametrize("base", ["dense", "toy"])
def test_checkpoints_and_folders_hold_the_adapter(base, tmp_path):
    model = adapted(quantization=BASES[base])
    described = engine.describe(model)
    state = engine.trainable_state_dict(model)
    assert sorted(k for k in state if "ia3" in k) == sorted(
        f"model.layers.{i}.{name}.ia3_l.default"
        for i in range(2)
        for name in ("mlp.down_proj", "self_attn.k_proj")
    )
    torch.manual_seed(0)
    restored = tiny_llama()
    engine.inject_as_described(restored, described)
    engine.load_trainable_state_dict(restored, state)
    lightning_peft.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = tiny_llama()
    lightning_peft.load_adapter(loaded, tmp_path, quantization_config=BASES[base])
    for other in (restored, loaded):
        assert torch.equal(output_of(other, BATCH), output_of(model, BATCH))
        assert isinstance(other.model.layers[0].mlp.down_proj, ScaledLinear)


def test_peft_reads_the_folder(tmp_path):
    model = adapted()
    lightning_peft.save_adapter(model, tmp_path)
    assert differences_in_peft(model, engine.record_of(model).parts[""], "default") == []
    torch.manual_seed(0)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert relative_error(output_of(theirs, BATCH), output_of(model, BATCH)) < 1e-6


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_folder_is_merged_weight_by_weight(base, tmp_path):
    model = adapted(quantization=BASES[base])
    merged, merge = merged_by_weight(model, tmp_path)
    assert len(merge.errors) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(merged[name], value), name


def test_a_model_that_peft_wrapped_is_taken_over():
    torch.manual_seed(0)
    model = tiny_llama()
    wrapped = get_peft_model(model, config())
    randomize(wrapped)
    expected = output_of(wrapped, BATCH)
    holder = nn.Module()
    holder.model = model
    lightning_peft.inject(holder)
    assert isinstance(model.model.layers[0].mlp.down_proj, ScaledLinear)
    assert relative_error(output_of(model, BATCH), expected) < 1e-6


def test_layers_without_a_form_in_place_get_the_wrappers_of_peft():
    settings = IA3Config(target_modules=["first"], feedforward_modules=[])
    model = stack()
    report = lightning_peft.inject(model, settings)
    assert not report.parts[0].in_place
    assert type(model.first).__module__.startswith("peft.tuners.ia3")
    conv1d = IA3Config(target_modules=["c_attn"], feedforward_modules=[])
    assert not lightning_peft.inject(tiny_gpt2(), conv1d).parts[0].in_place


@pytest.mark.parametrize("second", [config(), LoraConfig(r=2, target_modules=["q_proj"])])
def test_one_base_has_one_adapter_that_does_not_add_up(second):
    model = adapted()
    with pytest.raises(UnsupportedError, match="Several adapters on one base"):
        lightning_peft.inject(model, second, adapter_name="second")


def test_a_class_with_a_forward_pass_of_its_own_computes_with_the_scaled_weight():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * nn.functional.linear(input, self.weight)

    net = nn.Sequential(Doubled(6, 4, bias=False), nn.Linear(4, 2))
    weight = net[0].weight.detach().clone()
    lightning_peft.inject(net, IA3Config(target_modules=["0"], feedforward_modules=[]))
    randomize(net)
    x = torch.randn(3, 6)
    expected = 2 * x @ (weight * net[0].ia3_l["default"]).T
    torch.testing.assert_close(net[0](x), expected)
    torch.testing.assert_close(net[0].weight @ x.T, expected.T / 2)

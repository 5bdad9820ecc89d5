"""Merged weights are ``W + s B A`` within rounding, once, and the report says what was lost."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.errors import LifecycleError, UnsupportedError

from .reference import adapted, injected, output_of, randomize, refused, relative_error

NF4 = engine.quantization_config()
INT8 = engine.quantization_config(load_in_8bit=True)
# Half a unit in the last place, relative to the largest weight of a block of them.
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: layer._parameters["weight"].clone() for n, layer in engine.adapted_layers(model).items()
    }


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("build", [stack, tiny_gpt2], ids=["linear", "conv1d"])
def test_merged_weights_are_the_sum_within_rounding(build, dtype: torch.dtype) -> None:
    model = adapted(lambda: build().to(dtype))
    before = weights(model)
    deltas = {n: x.delta_weight("default") for n, x in engine.adapted_layers(model).items()}
    report = lightning_peft.merge(model)
    after = weights(model)
    for name, weight in before.items():
        exact = weight.double() + deltas[name].double()
        assert after[name].dtype == dtype
        assert relative_error(after[name], exact) <= ROUNDING[dtype]
    assert [layer.name for layer in report.layers] == list(before)
    assert not any(layer.was_quantized for layer in report.layers)
    lost = [
        relative_error(after[n].double() - before[n].double(), deltas[n].double()) for n in before
    ]
    for layer, share in zip(report.layers, lost, strict=True):
        assert layer.error == pytest.approx(share, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_is_once_and_unmerging_is_exact_within_rounding(dtype: torch.dtype) -> None:
    model = adapted(lambda: stack().to(dtype))
    before = weights(model)
    lightning_peft.merge(model)
    once = weights(model)
    report = lightning_peft.merge(model)
    assert report.layers == []
    assert "nothing to merge" in str(report)
    assert all(map(torch.equal, once.values(), weights(model).values()))
    for _ in range(2):
        lightning_peft.unmerge(model)
        for name, weight in weights(model).items():
            assert relative_error(weight, before[name]) <= 2 * ROUNDING[dtype]
    assert all(not layer.merged_adapters for layer in engine.adapted_layers(model).values())


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("build", [stack, tiny_llama], ids=["stack", "llama"])
def test_unmerging_a_quantized_base_is_bit_identical(build, config) -> None:
    model = adapted(build, quantization_config=config)
    batch = torch.randn(3, 96) if build is stack else token_batch()
    codes, expected = weights(model), output_of(model, batch)
    kinds = [type(child) for child in model.modules()]
    lightning_peft.merge(model)
    assert not any(is_quantized(layer) for layer in engine.adapted_layers(model).values())
    lightning_peft.unmerge(model)
    assert all(map(torch.equal, codes.values(), weights(model).values()))
    assert [type(child) for child in model.modules()] == kinds
    assert torch.equal(output_of(model, batch), expected)


@pytest.mark.parametrize("build", [stack, tiny_gpt2], ids=["linear", "conv1d"])
def test_a_merged_qlora_keeps_the_adapter_that_requantizing_would_lose(build) -> None:
    model = adapted(build, quantization_config=NF4)
    batch = torch.randn(3, 96) if build is stack else token_batch()
    expected = output_of(model, batch)
    report = lightning_peft.merge(model)
    assert relative_error(output_of(model, batch), expected) < 1e-5
    assert report.worst_error < 1e-5
    again = [layer.requantized_error for layer in report.layers]
    assert min(again) > 100 * report.worst_error
    assert min(again) > 0.05
    assert f"would lose up to {max(again):.2f} of it" in str(report)
    assert f"{len(again)} quantized layers are dense now" in str(report)


def test_what_the_report_says_of_requantizing_is_what_it_would_be() -> None:
    from lightning_peft.engine.backends.conversion import quantize

    model = adapted(quantization_config=NF4)
    with lightning_peft.disable_adapters(model):
        base = model.first.weight + 0
    delta = model.first.delta_weight("default")
    report = lightning_peft.merge(model)
    again = nn.Linear(96, 64)
    again.weight.data = base + delta
    quantize(again, NF4)
    lost = relative_error((again.weight + 0) - base, delta)
    assert report.layers[0].requantized_error == pytest.approx(lost, rel=1e-4)


def test_a_dtype_for_weights_that_were_quantized() -> None:
    model = adapted(quantization_config=NF4)
    report = lightning_peft.merge(model, dtype=torch.bfloat16)
    assert model.first._parameters["weight"].dtype == torch.bfloat16
    assert 1e-4 < report.worst_error < 0.1
    bfloat16 = injected(stack().to(torch.bfloat16), r=4, quantization_config=NF4)
    lightning_peft.merge(bfloat16)
    assert bfloat16.first._parameters["weight"].dtype == torch.bfloat16


def test_several_active_adapters_are_merged_together() -> None:
    model, x = stack(), torch.randn(3, 96)
    for name in ("a", "b", "resting"):
        lightning_peft.inject(model, r=2, adapter_name=name)
    lightning_peft.set_adapter(model, ["a", "b"])
    randomize(model)
    expected, before = model(x), weights(model)
    lightning_peft.merge(model)
    assert relative_error(model(x), expected) < 1e-5
    lightning_peft.unmerge(model)
    for name, weight in weights(model).items():
        assert relative_error(weight, before[name]) < 1e-6
    assert relative_error(model(x), expected) < 1e-6


def test_an_adapter_merged_on_top_of_another() -> None:
    model, x = stack(), torch.randn(3, 96)
    lightning_peft.inject(model, r=2, adapter_name="a")
    lightning_peft.merge(model)
    lightning_peft.inject(model, r=2, adapter_name="b")
    assert lightning_peft.merge(model).layers == []
    assert torch.isfinite(model(x)).all()


# --- unload ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_merge_and_unload_give_an_ordinary_model(quantized: dict) -> None:
    plain = tiny_llama()
    model, batch = adapted(tiny_llama, target_modules=["q_proj"], **quantized), token_batch()
    expected = output_of(model, batch)
    lightning_peft.merge(model)
    assert lightning_peft.unload(model) is model
    assert relative_error(output_of(model, batch), expected) < 1e-5
    assert [type(a) for a in model.modules()] == [type(b) for b in plain.modules()]
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain.load_state_dict(state)
    assert torch.equal(output_of(plain, batch), output_of(model, batch))
    assert engine.record_of(model) is None


def test_unload_without_merging_gives_the_base_back() -> None:
    for settings in ({}, {"quantization_config": NF4}):
        model, x = adapted(**settings), torch.randn(3, 96)
        with lightning_peft.disable_adapters(model):
            base = model(x)
        lightning_peft.unload(model)
        assert torch.equal(model(x), base)
        assert is_quantized(model.first) is bool(settings)
        assert not any("lora" in name for name in model.state_dict())
        # It can be adapted again.
        lightning_peft.inject(model, r=2)
        assert torch.equal(model(x), base)


def test_merges_by_peft_are_reported_as_such() -> None:
    model = injected(stack(), LoraConfig(target_modules=["first", "second"], lora_bias=True))
    report = lightning_peft.merge(model)
    assert {layer.error for layer in report.layers} == {None}
    assert "2 by PEFT, whose rounding is not measured" in str(report)
    assert lightning_peft.merge(model).layers == []


def test_unloading_half_merged_adapters_is_refused() -> None:
    model = adapted()
    lightning_peft.merge(model)
    model.second.merged_adapters = ()
    with pytest.raises(LifecycleError, match="Some active adapters are merged"):
        lightning_peft.unload(model)


# --- refused -----------------------------------------------------------------------------------


def test_tied_weights_are_refused() -> None:
    model = injected(tiny_llama(tied=True), r=2, target_modules=["q_proj", "lm_head"])
    with refused(model, UnsupportedError, r"lm_head shares its weight with .*embed_tokens"):
        lightning_peft.merge(model)


def test_one_layer_under_two_names_is_no_tie() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["b"] = model["a"]
    lightning_peft.inject(model, r=2)
    assert [layer.name for layer in lightning_peft.merge(model).layers] == ["a"]

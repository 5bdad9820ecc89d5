"""A merge or unload changes every layer or none; what cannot be merged is refused first."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from models import stack
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine import merging
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.errors import CheckpointError, LifecycleError, UnsupportedError

from .reference import adapted, injected, randomize, refused, relative_error

NF4 = engine.quantization_config(None)
PLAIN = LoraConfig(r=2, target_modules=["first", "second"])
WRAPPED = LoraConfig(r=2, target_modules=["first", "second"], lora_bias=True)


class Attention(nn.Module):
    """Self-attention by torch's own module, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.middle = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.mix(x, x, x)[0]))


# --- values that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_adapters_that_are_not_finite_are_refused_by_name(value: float, quantized: dict) -> None:
    model = adapted(r=2, **quantized)
    model.second.lora_A["default"].weight.data[0, :3] = value
    with refused(
        model, UnsupportedError, r"second\.lora_A\.default\.weight: 3 of 128 values are NaN or inf"
    ):
        lightning_peft.merge(model)


@pytest.mark.parametrize(
    ("settings", "broken"),
    [
        ({}, "head.bias"),
        ({"modules_to_save": ["first"]}, "first.bias"),
        ({"bias": "all"}, "2.bias"),
    ],
    ids=["head", "saved", "bias"],
)
def test_what_is_trained_in_full_is_finite_too(settings: dict, broken: str) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 6))
    model.add_module("second", nn.Linear(6, 6))
    model.add_module("2", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 2))
    lightning_peft.inject(model, LoraConfig(r=2, target_modules=["second"], **settings))
    randomize(model)
    dict(model.named_parameters())[broken].data[1] = math.inf
    with refused(model, UnsupportedError, rf"{broken}: 1 of \d values are NaN or infinite"):
        lightning_peft.merge(model)


def test_an_adapter_at_rest_may_be_broken() -> None:
    model, x = stack(), torch.randn(3, 96)
    for name in ("used", "broken"):
        lightning_peft.inject(model, r=2, adapter_name=name)
    randomize(model)
    model.first.lora_B["broken"].weight.data.fill_(math.nan)
    expected = model(x)
    lightning_peft.merge(model)
    assert relative_error(model(x), expected) < 1e-5


def test_a_sum_that_overflows_is_refused_after_which_nothing_is_merged() -> None:
    model = injected(stack().half(), r=2)
    randomize(model)
    model.second.lora_A["default"].weight.data.fill_(400.0)
    model.second.lora_B["default"].weight.data.fill_(400.0)
    with refused(model, UnsupportedError, r"second\.weight \(float16\)(.|\n)*65504"):
        lightning_peft.merge(model)


def test_a_quantized_base_that_overflows_in_another_dtype_stays_quantized() -> None:
    model = injected(stack(), r=2, quantization_config=NF4)
    model.first.lora_A["default"].weight.data.fill_(400.0)
    model.first.lora_B["default"].weight.data.fill_(400.0)
    with refused(model, UnsupportedError, r"first\.weight \(float16\)"):
        lightning_peft.merge(model, dtype=torch.float16)
    assert is_quantized(model.first)
    lightning_peft.merge(model)


# --- errors in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, WRAPPED], ids=["in-place", "wrapped"])
@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_an_interrupt_leaves_every_layer_unmerged(
    config: LoraConfig, quantized: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = injected(stack(), config, **quantized), torch.randn(3, 96)
    randomize(model)
    expected = model(x)
    wrapped = config is WRAPPED
    where, name = (type(model.second), "merge") if wrapped else (merging, "merged_weight")
    monkeypatch.setattr(where, name, _once(getattr(where, name)))
    with refused(model, KeyboardInterrupt, ""):
        lightning_peft.merge(model)
    monkeypatch.undo()
    assert torch.equal(model(x), expected)
    lightning_peft.merge(model)
    assert relative_error(model(x), expected) < 1e-5


def _once(function):
    calls = []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def test_unloading_that_runs_out_of_memory_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = adapted(r=2, target_modules=["first"], quantization_config=NF4), torch.randn(3, 96)
    lightning_peft.merge(model)
    expected = model(x)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.second), "effective_weight", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lightning_peft.unload(model)
    assert is_quantized(model.second)
    assert torch.equal(model(x), expected)
    lightning_peft.unload(model)
    assert type(model.second) is nn.Linear
    assert relative_error(model(x), expected) < 1e-5


def test_one_merged_wrapper_of_two_is_not_unloaded() -> None:
    model = injected(stack(), WRAPPED)
    model.second.merge()
    with pytest.raises(LifecycleError, match=r"Not merged:\n  - first"):
        lightning_peft.unload(model)


# --- layers that cannot be merged ----------------------------------------------------------------


def test_lora_bias_without_a_bias_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    lightning_peft.inject(model, LoraConfig(target_modules=["0", "1"], lora_bias=True))
    with pytest.raises(UnsupportedError, match="1 has lora_bias=True, and no bias"):
        lightning_peft.merge(model)


def test_memory_that_two_layers_share_without_sharing_a_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    lightning_peft.inject(model, LoraConfig(target_modules=["0", "2"]))
    with pytest.raises(UnsupportedError, match="0 shares its weight with 1,"):
        lightning_peft.merge(model)


@pytest.mark.parametrize("along", [0, 1])
def test_slices_of_one_tensor_are_merged_each_for_itself(along: int) -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(3, 6)
    whole = torch.randn(12, 12)
    first, second = whole.chunk(2, along)
    model[0].weight.data, model[1].weight.data = (
        v.narrow(1 - along, 0, 6) for v in (first, second)
    )
    lightning_peft.inject(model, LoraConfig(target_modules=["0", "1"]))
    randomize(model)
    expected = model(x)
    lightning_peft.merge(model)
    assert relative_error(model(x), expected) < 1e-5


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = stack()
    lightning_peft.inject(model, r=2)
    with pytest.raises(UnsupportedError, match="first.weight is on the meta device"):
        lightning_peft.merge(model)


def test_adapters_that_are_switched_off_are_not_left_out() -> None:
    model = injected(stack(), r=2)
    with (
        lightning_peft.disable_adapters(model),
        pytest.raises(LifecycleError, match=r"switched off(.|\n)*- first"),
    ):
        lightning_peft.merge(model)


# --- what is merged ------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [True, False])
def test_a_peft_model_runs_after_its_adapters_are_unloaded(merged: bool) -> None:
    base, x = stack(), torch.randn(3, 96)
    config = LoraConfig(target_modules=["first"], init_lora_weights=False)
    holder = nn.ModuleDict({"model": get_peft_model(copy.deepcopy(base), config)})
    lightning_peft.inject(holder)
    expected = holder["model"](x) if merged else base(x)
    if merged:
        lightning_peft.merge(holder)
    lightning_peft.unload(holder)
    assert isinstance(holder["model"], PeftModel)
    assert relative_error(holder["model"](x), expected) < 1e-5
    # It can be adapted again.
    lightning_peft.inject(holder, r=2)
    assert relative_error(holder["model"](x), expected) < 1e-5


def test_merging_in_inference_mode_leaves_weights_that_can_train() -> None:
    for quantized in ({}, {"quantization_config": NF4}):
        model, x = adapted(r=2, **quantized), torch.randn(3, 96)
        expected = model(x)
        with torch.inference_mode():
            lightning_peft.merge(model)
            lightning_peft.unload(model)
        assert relative_error(model(x), expected) < 1e-5
        assert not any(param.is_inference() for param in model.parameters())
        lightning_peft.inject(model, r=2)
        model(x).sum().backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_copies_of_a_merged_module_are_merged(copied, quantized: dict) -> None:
    model, x = adapted(r=2, **quantized), torch.randn(3, 96)
    before = model(x)
    lightning_peft.merge(model)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert lightning_peft.merge(other).layers == []
    lightning_peft.unmerge(other)
    assert torch.equal(other(x), before) if quantized else relative_error(other(x), before) < 1e-6
    assert not torch.equal(
        other.first._parameters["weight"].float().flatten()[:9],
        model.first._parameters["weight"].float().flatten()[:9],
    )


def test_adapters_with_different_targets_are_merged_where_they_are() -> None:
    model, x = stack(), torch.randn(3, 96)
    lightning_peft.inject(model, r=2, target_modules=["first"], adapter_name="one")
    lightning_peft.inject(model, r=2, target_modules=["second"], adapter_name="two")
    lightning_peft.set_adapter(model, ["one", "two"])
    randomize(model)
    expected = model(x)
    assert [layer.name for layer in lightning_peft.merge(model).layers] == ["first", "second"]
    assert relative_error(model(x), expected) < 1e-5
    with pytest.raises(LifecycleError, match="Choosing other adapters(.|\n)*unmerge"):
        lightning_peft.set_adapter(model, "one")
    lightning_peft.unload(model)
    assert relative_error(model(x), expected) < 1e-5


def test_forward_passes_through_adapted_attention_leave_the_frozen_weights_alone() -> None:
    model = Attention().bfloat16()
    x = torch.randn(2, 5, 12).bfloat16()
    params = dict(model.named_parameters())
    values = {name: param.detach().clone() for name, param in params.items()}
    lightning_peft.inject(model, LoraConfig(target_modules=["mix"]))
    for step in range(5):
        randomize(model, 0.1 + step)
        model(x).float().sum().backward()
    now = dict(model.named_parameters())
    for name, param in params.items():
        assert now[name] is param
        assert torch.equal(param, values[name])
    assert all(param.grad is not None for param in adapter_parameters(model).values())
    lightning_peft.merge(model)
    assert model.mix.in_proj_weight is params["mix.in_proj_weight"]
    lightning_peft.unmerge(model)
    assert all(now[name] is param for name, param in model.named_parameters())


@pytest.mark.parametrize("config", [PLAIN, WRAPPED], ids=["in-place", "wrapped"])
def test_autocast_does_not_round_a_merge(config: LoraConfig) -> None:
    model, x = injected(stack(), config), torch.randn(3, 96)
    randomize(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        lightning_peft.merge(model)
        assert torch.is_autocast_enabled("cpu")
    assert relative_error(model(x), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        lightning_peft.unmerge(model)
    assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.spectral_norm,
    ],
)
def test_a_weight_that_is_computed_takes_no_merge(norm) -> None:
    model = stack()
    model.first = norm(model.first)
    model.eval()
    lightning_peft.inject(model, LoraConfig(target_modules=["first", "second"], r=2))
    randomize(model)
    with refused(model, UnsupportedError, "first computes its weight in each forward pass"):
        lightning_peft.merge(model)


def test_an_adapter_that_broke_while_it_was_merged_is_not_subtracted() -> None:
    model = adapted(r=2)
    lightning_peft.merge(model)
    model.second.lora_A["default"].weight.data[0, 0] = math.nan
    with refused(model, UnsupportedError, r"second\.weight \(float32\)(.|\n)*unmerging"):
        lightning_peft.unmerge(model)


def test_files_of_a_merged_normalization_layer_hold_the_adapter(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    x, model = torch.randn(3, 6), copy.deepcopy(base)
    lightning_peft.inject(model, LNTuningConfig(target_modules=["1"]))
    randomize(model, 1.0)
    expected = model(x)
    lightning_peft.merge(model)
    lightning_peft.save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    lightning_peft.load_adapter(other, tmp_path)
    assert relative_error(other(x), expected) < 1e-6
    lightning_peft.unmerge(model)
    with lightning_peft.disable_adapters(model):
        assert torch.equal(model(x), base(x))
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model[1]) is nn.LayerNorm
    assert not any(param.requires_grad for param in model[1].parameters())
    assert relative_error(model(x), expected) < 1e-6


def test_attention_that_moves_while_it_is_merged() -> None:
    model, x = Attention(), torch.randn(2, 5, 12)
    lightning_peft.inject(model, LoraConfig(target_modules=["mix"]))
    randomize(model)
    expected = model(x)
    lightning_peft.merge(model)
    model.double()
    lightning_peft.unmerge(model)
    assert {param.dtype for param in model.parameters()} == {torch.float64}
    assert relative_error(model(x.double()), expected) < 1e-5


def test_folders_for_a_base_with_random_changes_are_refused(tmp_path) -> None:
    base = stack()
    config = LoraConfig(target_modules=["first"], r=2, init_lora_weights="pissa_niter_4")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "theirs")
    with refused(base, CheckpointError, "path_initial_model_for_weight_conversion"):
        lightning_peft.load_adapter(base, tmp_path / "theirs")
    model, x = copy.deepcopy(base), torch.randn(3, 96)
    lightning_peft.inject(model, config)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "ours")
    lightning_peft.load_adapter(base, tmp_path / "ours")
    assert relative_error(base(x), model(x)) < 1e-5

"""Turning adapters off gives the base exactly; choosing among them; finding their tensors."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_llama, token_batch
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError, LifecycleError

from .reference import injected, output_of, randomize

NF4 = engine.quantization_config()

SETTINGS = {
    "lora": {},
    "nf4": {"quantization_config": NF4},
    "saved": {"modules_to_save": ["lm_head", "layers.0.mlp"]},
    "biases": {"bias": "all"},
    "dora": {"use_dora": True},
    "dora with saved": {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only"},
}


def trained(**settings) -> nn.Module:
    model = injected(tiny_llama(), r=4, **settings)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    return model


@pytest.mark.parametrize("kind", SETTINGS)
def test_disabled_adapters_are_the_base_exactly(kind: str) -> None:
    torch.manual_seed(2)
    base = tiny_llama()
    torch.manual_seed(2)
    model, batch = trained(**SETTINGS[kind]), token_batch()
    if "quantization_config" in SETTINGS[kind]:
        lightning_peft.inject(base, r=1, quantization_config=NF4)
    expected, active = output_of(base, batch), output_of(model, batch)
    pointers = {name: param.data_ptr() for name, param in model.named_parameters()}
    grads = {name: param.requires_grad for name, param in model.named_parameters()}
    with lightning_peft.disable_adapters(model):
        assert torch.equal(output_of(model, batch), expected)
        with lightning_peft.disable_adapters(model):
            assert torch.equal(output_of(model, batch), expected)
        assert torch.equal(output_of(model, batch), expected)
    assert torch.equal(output_of(model, batch), active)
    assert not torch.allclose(active, expected)
    with pytest.raises(KeyError), lightning_peft.disable_adapters(model):
        raise KeyError
    assert torch.equal(output_of(model, batch), active)
    # An optimizer holds the same tensors as before.
    assert pointers == {name: param.data_ptr() for name, param in model.named_parameters()}
    assert grads == {name: param.requires_grad for name, param in model.named_parameters()}


def test_autocast_keeps_no_weights_of_the_base_for_the_trained_model() -> None:
    model, batch = trained(**SETTINGS["saved"]), token_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = output_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), lightning_peft.disable_adapters(model):
            base = output_of(model, batch)
        active = model(**batch)
        with torch.no_grad(), lightning_peft.disable_adapters(model):
            assert torch.equal(output_of(model, batch), base)
    assert torch.equal(active.logits, expected)
    active.loss.backward()
    assert model.lm_head.weight.grad.any()
    assert torch.is_autocast_cache_enabled()


def test_heads_keep_their_values_while_adapters_are_disabled() -> None:
    model, x = stack(), torch.randn(3, 96)
    lightning_peft.inject(model, r=4)
    nn.init.zeros_(model.head.weight)
    with lightning_peft.disable_adapters(model):
        assert torch.equal(model(x), model.head.bias.expand(3, -1))


def test_batch_statistics_of_saved_modules_are_put_back_too() -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 2)}
    )
    lightning_peft.inject(model, r=2, target_modules=["a"], modules_to_save=["norm"])
    x = torch.randn(8, 4) + 5
    model["norm"].train()(x)
    after = model["norm"].running_mean.clone()
    with lightning_peft.disable_adapters(model):
        assert not model["norm"].running_mean.any()
        model["norm"](x)
    with lightning_peft.disable_adapters(model):
        assert not model["norm"].running_mean.any()
    assert torch.equal(model["norm"].running_mean, after)


def test_gradients_of_a_policy_beside_its_reference() -> None:
    """What preference tuning does: the reference is the same module with adapters disabled."""
    model, batch = trained(modules_to_save=["lm_head"]), token_batch()
    reference = None
    output = output_of(model, batch)
    with torch.no_grad(), lightning_peft.disable_adapters(model):
        reference = output_of(model, batch)
    (output - reference).pow(2).sum().backward()
    with_others = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    (output_of(model, batch) - reference).pow(2).sum().backward()
    alone = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(map(torch.equal, with_others, alone))


def test_merged_adapters_cannot_be_disabled() -> None:
    for settings in ({}, {"use_dora": True}):
        model = trained(**settings)
        lightning_peft.merge(model)
        with pytest.raises(LifecycleError, match="Call lightning_peft.unmerge"):
            lightning_peft.disable_adapters(model).__enter__()


# --- several adapters ---------------------------------------------------------------------------


def test_a_second_adapter_changes_nothing_until_it_is_chosen() -> None:
    model, x = stack(), torch.randn(3, 96)
    base = model(x)
    lightning_peft.inject(model, r=4, adapter_name="a")
    randomize(model)
    first = model(x)
    lightning_peft.inject(model, r=2, adapter_name="b")
    for name, value in engine.adapter_parameters(model).items():
        if ".b." in name:
            nn.init.normal_(value)
    assert torch.equal(model(x), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" in n} == {
        n for n, _ in model.named_parameters() if ".a." in n
    }
    lightning_peft.set_adapter(model, "b")
    second = model(x)
    assert not torch.allclose(second, first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".a." in n)
    lightning_peft.set_adapter(model, "a")
    assert torch.equal(model(x), first)
    with lightning_peft.disable_adapters(model):
        assert torch.equal(model(x), base)


def test_a_second_adapter_may_be_on_other_layers() -> None:
    model, x = stack(), torch.randn(3, 96)
    base = model(x)
    lightning_peft.inject(model, r=4, target_modules=["first"], adapter_name="a")
    lightning_peft.inject(model, r=4, target_modules=["second"], adapter_name="b")
    randomize(model)
    both = {}
    for name in ("a", "b"):
        lightning_peft.set_adapter(model, name)
        both[name] = model(x)
        assert not torch.equal(both[name], base)
    assert not torch.equal(both["a"], both["b"])
    assert [p.adapted for p in lightning_peft.report(model).parts] == [{"second": 1}]


def test_unknown_adapters_are_an_error_that_lists_the_known_ones() -> None:
    model = trained()
    with pytest.raises(ConfigError, match=r"\['b'\]\): this module's adapters are 'default'"):
        lightning_peft.set_adapter(model, "b")
    with pytest.raises(ConfigError, match="Use disable_adapters"):
        lightning_peft.set_adapter(model, [])
    assert engine.require_record(model).active == ("default",)


def test_other_adapters_are_not_chosen_over_merged_ones() -> None:
    model = injected(stack(), r=4, adapter_name="a")
    lightning_peft.inject(model, r=4, adapter_name="b")
    lightning_peft.merge(model)
    with pytest.raises(LifecycleError, match=r"(.|\n)*first(.|\n)*unmerge"):
        lightning_peft.set_adapter(model, "b")
    lightning_peft.set_adapter(model, "a")
    lightning_peft.unmerge(model)
    lightning_peft.set_adapter(model, "b")


# --- which tensors they are ---------------------------------------------------------------------


def test_adapters_are_found_by_place_not_by_name() -> None:
    model = nn.ModuleDict(
        {"lora_A": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    )
    lightning_peft.inject(model, r=2)
    assert engine.adapter_parameters(model).keys() == {
        f"{layer}.lora_{side}.default.weight" for layer in ("lora_A", "b") for side in "AB"
    }


def test_all_adapter_parameters_of_all_parts() -> None:
    model = nn.ModuleDict({"a": stack(), "b": stack()})
    assert engine.all_adapter_parameters(model) == []
    lightning_peft.inject(model, r=2, adapt=["a", "b"])
    found = engine.all_adapter_parameters(model)
    assert len(found) == 8
    assert {id(p) for p in found} == {id(p) for n, p in model.named_parameters() if "lora_" in n}

"""What would go wrong is refused before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import (
    ConfigError,
    LifecycleError,
    TargetModulesError,
    UnsupportedError,
)

from .reference import injected, refused

NF4 = engine.quantization_config()


def adapted(**settings) -> nn.Module:
    return injected(stack(), r=2, adapter_name="first", **settings)


def wrapped_attention() -> nn.Module:
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})


def encoder() -> nn.Module:
    return nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16), "head": nn.Linear(8, 2)})


def aliased() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    model["b"] = model["a"]
    return model


class OwnAdapters(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_A = nn.Linear(4, 2)


class Own(nn.Linear):
    """A subclass, which is never quantized."""


def in_wrappers(**settings: Any) -> dict[str, Any]:
    """Settings of LoRA that PEFT's own layers are for."""
    return {"peft_config": LoraConfig(lora_bias=True, r=2, **settings)}


REFUSED = {
    "the same adapter twice": (
        adapted,
        {"adapter_name": "first"},
        LifecycleError,
        "'first' is on the module already",
    ),
    "quantizing later": (
        adapted,
        {"adapter_name": "second", "quantization_config": NF4},
        LifecycleError,
        "quantizing it as .* now would change what the adapter 'first'",
    ),
    "a second one with saved modules": (
        adapted,
        {"adapter_name": "second", "modules_to_save": ["head"]},
        UnsupportedError,
        "`modules_to_save` and `bias` are supported for the only adapter",
    ),
    "a second one with biases": (
        adapted,
        {"adapter_name": "second", "bias": "all"},
        UnsupportedError,
        "`modules_to_save` and `bias`",
    ),
    "a second one next to saved modules": (
        lambda: adapted(modules_to_save=["head"]),
        {"adapter_name": "second"},
        UnsupportedError,
        "`modules_to_save` and `bias`",
    ),
    "a second one that rewrites the base": (
        adapted,
        {"adapter_name": "second", "init_lora_weights": "pissa"},
        UnsupportedError,
        "rewrites the base",
    ),
    "a second one on a rewritten base": (
        lambda: adapted(init_lora_weights="pissa"),
        {"adapter_name": "second"},
        UnsupportedError,
        "rewrites the base",
    ),
    "a second one in PEFT's wrappers": (
        adapted,
        {"adapter_name": "second", **in_wrappers()},
        UnsupportedError,
        "supported for LoRA in place only",
    ),
    "a second one with PEFT's wrappers": (
        lambda: injected(stack(), **in_wrappers(target_modules=["first"])),
        {"adapter_name": "second"},
        UnsupportedError,
        "supported for LoRA in place only",
    ),
    "LoRA next to DoRA": (
        lambda: adapted(use_dora=True),
        {"adapter_name": "second"},
        UnsupportedError,
        "supported for LoRA in place only",
    ),
    "one side of tied weights": (
        lambda: tiny_llama(tied=True),
        {"modules_to_save": ["lm_head"]},
        ConfigError,
        r"lm_head\.weight is tied to model\.embed_tokens\.weight",
    ),
    "wrapping an alias": (
        aliased,
        in_wrappers(target_modules=["a"]),
        UnsupportedError,
        "a is also called b",
    ),
    "wrapping what attention reads": (
        wrapped_attention,
        in_wrappers(target_modules=["out_proj"]),
        UnsupportedError,
        r"out_proj lies in a MultiheadAttention",
    ),
    "wrapping what an encoder layer reads": (
        encoder,
        in_wrappers(target_modules=["linear1"]),
        UnsupportedError,
        "linear1 lies in a TransformerEncoderLayer",
    ),
    "wrapping a quantized Conv1D": (
        tiny_gpt2,
        {**in_wrappers(target_modules=["c_attn"]), "quantization_config": NF4},
        UnsupportedError,
        "is a quantized Conv1D",
    ),
    "eight bits of a Conv1D": (
        tiny_gpt2,
        {"quantization_config": engine.quantization_config(load_in_8bit=True)},
        UnsupportedError,
        "stores its weight transposed",
    ),
    "quantizing on the meta device": (
        lambda: stack().to("meta"),
        {"quantization_config": NF4},
        UnsupportedError,
        "meta device",
    ),
    "a layer with adapters of its own": (
        lambda: nn.ModuleDict({"layer": OwnAdapters(), "head": nn.Linear(4, 2)}),
        {"target_modules": ["layer"]},
        UnsupportedError,
        r"layer \(OwnAdapters\) has adapters of its own",
    ),
    "no saved module": (stack, {"modules_to_save": ["hed"]}, TargetModulesError, "'hed'"),
    "a config and its fields": (
        stack,
        {"peft_config": LoraConfig(), "r": 4},
        ConfigError,
        r"Both `peft_config` and \['r'\]",
    ),
    "an unknown layer to skip": (
        stack,
        {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, llm_int8_skip_modules=["secnd"]
            )
        },
        TargetModulesError,
        "'secnd' of llm_int8_skip_modules matches nothing; near names: second",
    ),
    "nothing to quantize": (
        lambda: nn.ModuleDict({"layer": Own(4, 4), "head": nn.Linear(4, 2)}),
        {"quantization_config": NF4},
        UnsupportedError,
        "Nothing to quantize in ModuleDict",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_touched(case: str) -> None:
    build, arguments, error, message = REFUSED[case]
    model = build()
    with refused(model, error, message):
        lightning_peft.inject(model, **arguments)


def test_several_problems_come_together() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "a": nn.Linear(8, 8)})
    model["b"] = model["a"]
    with pytest.raises(UnsupportedError) as caught:
        lightning_peft.inject(model, **in_wrappers(target_modules=["out_proj", "a"]))
    assert "MultiheadAttention" in str(caught.value)
    assert "also called b" in str(caught.value)


def test_both_sides_of_tied_weights_may_be_saved() -> None:
    model = injected(tiny_llama(tied=True), r=2, modules_to_save=["lm_head", "embed_tokens"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.requires_grad


def test_the_same_quantization_may_be_named_again() -> None:
    model = adapted(quantization_config=NF4)
    lightning_peft.inject(model, r=2, adapter_name="second", quantization_config=NF4)
    assert engine.require_record(model).adapter_names == ["first", "second"]
    fp4 = engine.quantization_config(bnb_4bit_quant_type="fp4")
    with pytest.raises(LifecycleError, match="Use the same quantization"):
        lightning_peft.inject(model, r=2, adapter_name="third", quantization_config=fp4)


def test_parts_are_fixed_by_the_first_call() -> None:
    model = nn.ModuleDict({"a": stack(), "b": stack()})
    lightning_peft.inject(model, r=2, adapt="a", adapter_name="first")
    # Without `adapt`, the parts of the first call; another part may be added by name.
    lightning_peft.inject(model, r=2, adapter_name="second")
    assert engine.require_record(model).parts.keys() == {"a"}
    lightning_peft.inject(model, r=2, adapt="b", adapter_name="first")
    assert engine.require_record(model).parts.keys() == {"a", "b"}
    with pytest.raises(LifecycleError, match="overlaps 'a'"):
        lightning_peft.inject(model, r=2, adapt="", adapter_name="third")
    with pytest.raises(LifecycleError, match="'a.first' overlaps 'a'"):
        lightning_peft.inject(model, r=2, adapt="a.first", adapter_name="third")


def test_parts_that_share_layers_are_refused() -> None:
    shared = nn.Linear(4, 4)
    parts = {n: nn.ModuleDict({"x": shared, "head": nn.Linear(4, 2)}) for n in ("a", "b")}
    with pytest.raises(TargetModulesError, match="b.x is a.x"):
        lightning_peft.inject(nn.ModuleDict(parts), r=2, adapt=["a", "b"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_an_element_stay_dense() -> None:
    """A forecasting model without known inputs has a layer for none of them."""
    model = nn.Sequential(nn.Linear(0, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    expected = model[0](torch.zeros(3, 0))
    part = injected(model, r=2, quantization_config=NF4)
    assert type(part[0]).__name__ == "LoraLinear"
    assert torch.equal(part[0](torch.zeros(3, 0)), expected)


def test_which_layers_are_quantized() -> None:
    """Linear layers of the part, except heads, outputs, saved modules, skipped and shared ones."""
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "skipped": nn.Linear(8, 8),
            "shared_a": nn.Linear(8, 8),
            "shared_b": nn.Linear(8, 8),
            "saved": nn.Sequential(nn.Linear(8, 8)),
            "inner": nn.ModuleDict({"skipped": nn.Linear(8, 8)}),
            "norm": nn.LayerNorm(8),
            "head": nn.Linear(8, 2),
        }
    )
    model["shared_b"].weight = model["shared_a"].weight
    skipping = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["skipped"])
    lightning_peft.inject(
        model,
        r=2,
        target_modules=["plain", "shared_a"],
        modules_to_save=["saved"],
        quantization_config=skipping,
    )
    assert engine.require_record(model).parts[""].quantized == ["plain"]
    assert model["shared_a"]._parameters["weight"] is model["shared_b"].weight
    llama = injected(tiny_llama(), r=2, target_modules=["q_proj"], quantization_config=NF4)
    # Layers without an adapter are quantized too: the base as a whole is frozen.
    assert len(engine.require_record(llama).parts[""].quantized) == 14
    assert llama.lm_head.weight.dtype == torch.float32

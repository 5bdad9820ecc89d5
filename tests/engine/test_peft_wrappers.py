"""Models that PEFT wrapped are recognised: their adapters go on, in place."""

from __future__ import annotations

import peft
import pytest
import torch
from models import bert_config, stack, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BertForSequenceClassification, BitsAndBytesConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.errors import LifecycleError, TargetModulesError, UnsupportedError

from .reference import output_of, refused, relative_error

NF4 = engine.quantization_config(None)
QV = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])


class Holder(nn.Module):
    """As a LightningModule holds a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: object) -> torch.Tensor:
        return self.model(**batch).logits


def wrapped(build, config: LoraConfig) -> PeftModel:
    model = get_peft_model(build(), config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn_like(param) * 0.1)
    return model.eval()


CASES = {
    "llama": (tiny_llama, QV),
    "typed": (tiny_llama, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")),
    "gpt2": (tiny_gpt2, LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
    "patterns": (
        tiny_llama,
        LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 2}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_adapters_move_onto_the_layers(case) -> None:
    build, config = CASES[case]
    holder, batch = Holder(wrapped(build, config)), token_batch()
    before = output_of(holder.model, batch)
    values = {n: p.clone() for n, p in holder.named_parameters() if "lora_" in n}
    report = lightning_peft.inject(holder)
    assert relative_error(holder(**batch), before) < 1e-6
    assert not [m for m in holder.modules() if isinstance(m, BaseTunerLayer)]
    assert isinstance(holder.model, PeftModel)
    assert report.parts[0].name == "model.base_model.model"
    now = engine.adapter_parameters(holder)
    assert now.keys() == values.keys()
    assert all(torch.equal(now[n], value) for n, value in values.items())
    verification = lightning_peft.verify(holder, batch, lambda m, b: m(**b).pow(2).mean())
    assert verification.passed, verification
    if case != "gpt2":  # its embedding is tied
        lightning_peft.merge(holder)
        assert relative_error(holder(**batch), before) < 1e-5


def test_the_base_is_quantized_beneath() -> None:
    holder, batch = Holder(wrapped(tiny_llama, QV)), token_batch()
    report = lightning_peft.inject(holder, quantization_config=NF4)
    assert report.parts[0].quantized == 14
    layers = engine.adapted_layers(holder)
    assert len(layers) == 4
    assert all(isinstance(layer, LoraLayer) for layer in layers.values())
    assert report.parts[0].method == "LoRA r=4 alpha=6"
    assert holder(**batch).isfinite().all()


def test_saved_modules_are_the_copies_that_trained(tmp_path) -> None:
    config = bert_config(num_hidden_layers=1, num_labels=3)
    lora = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    holder = Holder(wrapped(lambda: BertForSequenceClassification(config), lora))
    copy_of_head = holder.model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        copy_of_head.weight.add_(1.0)
    batch = {"input_ids": token_batch()["input_ids"]}
    before = output_of(holder.model, batch)
    report = lightning_peft.inject(holder)
    assert report.parts[0].saved == ["classifier"]
    assert holder.model.base_model.model.classifier is copy_of_head
    assert copy_of_head.weight.requires_grad
    assert relative_error(holder(**batch), before) < 1e-6
    lightning_peft.save_adapter(holder, tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_settings_may_be_requested_and_others_not() -> None:
    lightning_peft.inject(Holder(wrapped(tiny_llama, QV)), QV)
    holder = Holder(wrapped(tiny_llama, QV))
    with refused(holder, LifecycleError, r"r=4 in the module, asked for 8(.|\n)*defaults"):
        lightning_peft.inject(holder, r=8, lora_alpha=6)


def test_other_parts_or_names_are_not_passed_over() -> None:
    for asked, found in (
        ({"adapt": "model"}, r"adapt=\['model'\]"),
        ({"adapter_name": "mine"}, "called 'default', asked for 'mine'"),
    ):
        holder = Holder(wrapped(tiny_llama, QV))
        with refused(holder, LifecycleError, found):
            lightning_peft.inject(holder, **asked)


REFUSED = {
    "bias": (lambda: get_peft_model(stack(), LoraConfig(lora_bias=True, target_modules=["first"]))),
    "ia3": lambda: get_peft_model(
        stack(), peft.IA3Config(target_modules=["first"], feedforward_modules=[])
    ),
    "pissa": lambda: get_peft_model(
        stack(), LoraConfig(init_lora_weights="pissa", target_modules=["first"])
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_move_is_refused_and_left_alone(kind) -> None:
    model = REFUSED[kind]()
    with refused(model, UnsupportedError, r"cannot be taken over(.|\n)*get_peft_model"):
        lightning_peft.inject(Holder(model))


def test_several_or_merged_adapters_are_refused() -> None:
    several = wrapped(tiny_llama, QV)
    several.add_adapter("second", QV)
    with pytest.raises(UnsupportedError, match=r"several adapters \(default, second\)"):
        lightning_peft.inject(Holder(several))
    merged = wrapped(tiny_llama, QV)
    merged.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged"):
        lightning_peft.inject(Holder(merged))


def test_a_failure_later_on_puts_the_wrappers_back() -> None:
    model = get_peft_model(stack(), LoraConfig(r=2, target_modules=["first", "second", "head"]))
    holder = nn.ModuleDict({"net": model})
    skipping = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nowhere"])
    with refused(holder, TargetModulesError, "nowhere"):
        lightning_peft.inject(holder, quantization_config=skipping)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(x, x, x)[0])


@pytest.mark.parametrize("targets", [["mix"], ["mix", "out"]])
def test_adapters_on_multihead_attention_are_taken_over(tmp_path, targets) -> None:
    config = LoraConfig(target_modules=targets, init_lora_weights=False)
    model, x = get_peft_model(Attending(), config), torch.randn(4, 2, 8)
    expected = model(x)
    values = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    lightning_peft.inject(model)
    assert relative_error(model(x), expected) < 1e-6
    now = engine.adapter_parameters(model)
    values = {name.replace(".base_layer.", "."): value for name, value in values.items()}
    assert now.keys() == values.keys()
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= set(values)
    lightning_peft.save_adapter(model, tmp_path)
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert relative_error(model(x), expected) < 1e-5


def test_attention_that_cannot_be_taken_over_is_left_as_it_was() -> None:
    model, x = get_peft_model(Attending(), LoraConfig(target_modules=["mix"])), torch.randn(4, 2, 8)
    kept, expected = dict(model.named_modules()), model(x)
    # PEFT's layer makes new parameters each time that it is asked for its names.
    with pytest.raises(LifecycleError, match=r"r=8 in the module, asked for 2"):
        lightning_peft.inject(model, LoraConfig(r=2, target_modules=["mix"]))
    assert dict(model.named_modules()) == kept
    assert torch.equal(model(x), expected)

"""What is decided by a model's type: experts, state space models, weights changed in place."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BitsAndBytesConfig,
    FalconConfig,
    LukeConfig,
    MambaConfig,
    Qwen3MoeConfig,
    RwkvConfig,
)

import lightning_peft
from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.engine.model_types import hidden_model_type, retargeted_by_peft
from lightning_peft.engine.selection.unsupported_layers import self_modified_layers
from lightning_peft.errors import UnsupportedError

from .reference import injected

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
EXPERTS = Qwen3MoeConfig(
    **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0],
)  # fmt: skip


def model_of(config, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    return auto.from_config(config).eval()


def test_dense_layers_and_experts_are_adapted_and_nothing_else():
    model = injected(model_of(EXPERTS), r=4)
    attention = {f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"}
    dense = {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    experts = {f"layers.1.mlp.experts.{name}_proj_per_expert" for name in ("gate_up", "down")}
    assert {n.partition(".")[2] for n in adapted_layers(model)} == attention | dense | experts
    assert model.config is EXPERTS


def test_peft_would_take_other_layers_of_a_model_with_experts():
    config = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    (changed, widened) = retargeted_by_peft(model_of(EXPERTS), config)
    assert changed == "target_modules becomes ['q_proj']"
    assert widened == "target_parameters becomes ['down_proj', 'gate_up_proj']"
    # The config that was asked about is left as it was.
    assert config.target_modules == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert not retargeted_by_peft(model_of(EXPERTS), LoraConfig(target_modules=["q_proj"]))


def test_saving_says_that_peft_would_adapt_other_layers(tmp_path):
    model = model_of(EXPERTS)
    base = copy.deepcopy(model)
    # As weights, which PEFT takes by their names, they could have no dropout.
    lightning_peft.inject(model, r=4, init_lora_weights=False, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="target_parameters becomes .'down_proj', 'gate_up_proj'"):
        lightning_peft.save_adapter(model, tmp_path)
    lightning_peft.load_adapter(base, tmp_path)
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(base.eval()(ids).logits, model(ids).logits)


def test_a_refusal_of_peft_leaves_the_config_on_the_model():
    model = model_of(EXPERTS)
    seen = []

    def refuse():
        with hidden_model_type(model):
            seen.append(hasattr(model, "config"))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        refuse()
    assert seen == [False]
    assert model.config is EXPERTS


def test_output_projections_of_mamba_are_adapted_in_place():
    model = injected(model_of(MambaConfig(**SIZES, state_size=4)), r=4)
    names = [n for n in adapted_layers(model) if n.endswith("out_proj")]
    assert len(names) == 2
    layer = model.get_submodule(names[0])
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.1)
        x = torch.randn(3, layer.in_features)
        # Fused kernels read the weight; the layer is not called.
        torch.testing.assert_close(x @ layer.weight.t(), layer(x))


def test_wrappers_that_the_fused_kernels_of_mamba_would_pass_by_are_refused():
    model = model_of(MambaConfig(**SIZES, state_size=4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="out_proj: the fused kernels of mamba read its"):
        lightning_peft.inject(model, LoraConfig(r=4, lora_bias=True))
    assert model.state_dict().keys() == before.keys()


def test_the_linear_layers_of_falcon_are_quantized():
    model = model_of(FalconConfig(**SIZES, num_attention_heads=4))
    ids = torch.arange(3, 15)[None]
    lightning_peft.inject(model, r=4, quantization_config=NF4)
    layers = adapted_layers(model)
    assert len(layers) == 8
    assert all(is_quantized(layer) for layer in layers.values())
    layer = next(iter(layers.values()))
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), x @ layer.weight.t(), rtol=1e-4, atol=1e-4)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Clamping(nn.Module):
    """Clamps one weight in training, as the coefficients of Gemma 3n are."""

    def __init__(self):
        super().__init__()
        self.coefficients, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        if self.training:
            self.coefficients.weight.data.clamp_(-0.01, 0.01)
        return self.plain(self.coefficients(x))


def clamping():
    return nn.Sequential(Clamping(), Clamping(), nn.Linear(8, 2))


@pytest.mark.parametrize("quantization", [None, NF4])
def test_a_layer_whose_weight_is_changed_while_it_runs_stays_plain(quantization):
    model = injected(clamping(), r=4, quantization_config=quantization)
    assert list(adapted_layers(model)) == ["0.plain", "1.plain"]
    assert not is_quantized(model[0].coefficients)
    model.train()(torch.randn(3, 8)).sum().backward()
    assert model[0].coefficients.weight.abs().max() <= 0.01


def test_such_a_layer_cannot_be_named():
    words = "1.coefficients: Clamping changes its weight in place while it runs"
    with pytest.raises(UnsupportedError, match=words):
        lightning_peft.inject(clamping(), r=4, target_modules=["coefficients", "plain"])


def test_layers_that_rwkv_rescales_are_found():
    model = model_of(RwkvConfig(**SIZES, attention_hidden_size=32, rescale_every=1))
    found = self_modified_layers(model)
    assert {n.split(".", 3)[3] for n in found} == {"attention.output", "feed_forward.value"}
    assert set(found.values()) == {"RwkvModel"}


def test_a_head_tied_to_embeddings_is_no_fresh_head(tmp_path):
    config = LukeConfig(
        vocab_size=64, entity_vocab_size=16, hidden_size=32, entity_emb_size=16,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
    )  # fmt: skip
    model = model_of(config, AutoModelForMaskedLM)
    base = copy.deepcopy(model)
    report = lightning_peft.inject(model, r=4, init_lora_weights=False)
    assert not any(part.heads for part in report.parts)
    lightning_peft.save_adapter(model, tmp_path)
    lightning_peft.load_adapter(base, tmp_path)
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(base.eval()(ids).logits, model(ids).logits)

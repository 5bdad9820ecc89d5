import bitsandbytes as bnb
import pytest
import torch
from models import llama_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.plan.memory import static_memory

NF4 = engine.quantization_config()


def nf4_bytes(parameters):
    return engine.backend_for(NF4).stored_bytes(parameters, NF4)


@pytest.fixture
def model():
    config = llama_config(vocab_size=128, intermediate_size=192)
    return LlamaForCausalLM(config)


def test_four_bit_bytes_are_those_of_the_stored_tensors():
    weight = torch.randn(192, 128)
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    state = packed.quant_state
    stored = packed.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert nf4_bytes(weight.numel()) == stored
    assert 8 * nf4_bytes(4096 * 4096) / 4096**2 == pytest.approx(4.127, abs=5e-4)


def test_predicted_bytes_are_those_of_the_adapted_models(model):
    full, lora, qlora = static_memory(model, r=8)
    count = sum(p.numel() for p in model.parameters())
    assert full.weights == full.gradients == 4 * count
    assert full.optimizer == 8 * count
    quantized = lightning_peft.inject(model, r=8, quantization_config=engine.quantization_config())
    assert qlora.trainable == lora.trainable == quantized.trainable_parameters
    assert qlora.weights == quantized.base_bytes + quantized.trainable_bytes
    assert lora.weights == quantized.dense_base_bytes + quantized.trainable_bytes
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for param in trained:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert qlora.gradients == sum(p.grad.nbytes for p in trained)
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert qlora.optimizer == sum(m.nbytes for m in moments)


def test_the_model_itself_stays_as_it_is(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    static_memory(model)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(param.requires_grad for param in model.parameters())


def test_eight_billion_parameters_come_out_as_published():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).to(torch.bfloat16)
    full, lora, qlora = static_memory(llama, r=16)
    assert lora.trainable == qlora.trainable == 41_943_040
    # 16 GB of weights, 16 GB of gradients, 64 GB of moments.
    assert [round(x / 8e9, 1) for x in (full.weights, full.gradients, full.optimizer)] == [2, 2, 8]
    assert qlora.total < 0.1 * full.total

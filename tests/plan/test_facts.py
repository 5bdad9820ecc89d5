"""Arithmetic that practitioners know by heart has to come out exactly."""

import pytest
import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.plan.prediction import plan_memory

NF4 = engine.quantization_config()


def nf4_bytes(parameters):
    return engine.backend_for(NF4).stored_bytes(parameters, NF4)


def plan(llama, method, **settings):
    return plan_memory(str(llama), method=method, seq_len=16, **settings)


def test_an_8b_model_with_lora(llama_3_8b):
    lora = plan(llama_3_8b, "lora", lora={"r": 16})
    assert lora.trace.trainable == 41_943_040
    assert lora.trace.total == 8_072_204_288
    assert lora.breakdown["weights_dense"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert lora.breakdown["adapters"] == 4 * 41_943_040


def test_an_8b_model_with_qlora_of_rank_64(llama_3_8b):
    qlora = plan(llama_3_8b, "qlora", lora={"r": 64})
    assert qlora.trace.trainable == 167_772_160
    linear = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    # To the byte but for the code tables: 16 and 256 numbers and an offset in each layer.
    assert qlora.breakdown["weights_quantized"] == nf4_bytes(linear) + 224 * 4 * (16 + 256 + 1)
    assert 8 * nf4_bytes(linear) / linear == pytest.approx(4.127, abs=5e-4)


def test_an_8b_model_in_full(llama_3_8b):
    full = plan(llama_3_8b, "full")
    # 16 GB of weights, 16 GB of gradients, 64 GB of states: 96 GB.
    assert full.breakdown["weights_dense"] == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert full.trace.gradients == 2 * 8_030_261_248
    assert full.trace.optimizer == 8 * 8_030_261_248
    assert full.peak_bytes > 96e9


def test_one_layer():
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(4096, 11008, bias=False), nn.Linear(11008, 2, bias=False))
    # The last layer is a head, which trains in full.
    found = plan_memory(layers, torch.zeros(1, 4096), method="lora").trace.trainable - 2 * 11008
    assert found == 241_664
    assert 1 - found / 45_088_768 == pytest.approx(0.9946, abs=5e-5)


@pytest.mark.parametrize(
    ("billions", "sixteen", "four"), [(7, 14, 3.5), (13, 26, 6.5), (65, 130, 32.5)]
)
def test_sixteen_and_four_bits(billions, sixteen, four):
    assert billions * 16 / 8 == sixteen
    constants = nf4_bytes(billions * 10**9) / 1e9 - four
    assert constants == pytest.approx(billions * 0.127 / 8, rel=2e-3)


def test_double_quantization_saves_3_gigabytes_at_65b():
    single = 65e9 * 4.5 / 8
    assert (single - nf4_bytes(65 * 10**9)) / 1e9 == pytest.approx(3.03, abs=0.01)


def test_one_constant_of_32_bits_for_64_weights_is_half_a_bit():
    import bitsandbytes.functional as F

    weights = torch.randn(4096, 64)
    codes, state = F.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    stored = codes.numel() * codes.element_size() + state.absmax.numel() * 4
    assert 8 * stored / weights.numel() == 4.5

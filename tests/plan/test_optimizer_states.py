import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lightning_peft import engine
from lightning_peft.plan.margins import OVER
from lightning_peft.plan.prediction import plan_memory
from lightning_peft.plan.settings import paged_bytes, state_bytes, step_bytes


def trained(dtype=torch.float32):
    torch.manual_seed(0)
    # Fewer than 4,096 elements, more, and no multiple of a block.
    sizes = [(10, 10), (64, 100), (401, 300)]
    params = [nn.Parameter(torch.randn(size, dtype=dtype)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def held(optimizer):
    """Bytes of all tensors of a state that are as many as elements, or as blocks of them."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step" and not name.startswith("qmap")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_states(dtype):
    params = trained(dtype)
    optimizer = torch.optim.AdamW(params)
    optimizer.step()
    assert state_bytes(params, "adamw_torch") == held(optimizer)
    count = sum(param.numel() for param in params)
    assert state_bytes(params, "adamw") == 8 * count
    assert step_bytes(params, "adamw_torch", "cuda") == count * dtype.itemsize
    assert step_bytes(params, "adamw_torch", "cpu") == 2 * 401 * 300 * dtype.itemsize


@pytest.mark.parametrize(
    "name",
    ["adamw_32bit", "paged_adamw_32bit", "adamw_8bit", "lion_8bit", "lion_32bit", "ademamix",
     "ademamix_8bit"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_states(name):
    params = trained()
    optimizer = torch.optim.AdamW(params)
    engine.replace_optimizers([optimizer], name)
    optimizer.step()
    assert state_bytes(params, name) == held(optimizer)
    assert step_bytes(params, name, "cuda") == 0


def test_only_large_tensors_are_paged():
    params = trained()
    assert paged_bytes(params, "adamw_8bit") == 0
    assert paged_bytes(params, "paged_adamw_32bit") == 8 * 401 * 300


def test_paged_states_may_leave_the_gpu():
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16",
    )  # fmt: skip
    given = {"method": "lora", "seq_len": 8, "lora": {"r": 256}}
    paged, fixed = (
        plan_memory(config, optimizer=name, **given)
        for name in ("paged_adamw_32bit", "adamw_32bit")
    )
    assert paged.peak_bytes == fixed.peak_bytes
    assert paged.high_bytes == fixed.high_bytes
    # Factors of 256 x 512 and 256 x 1,024: two float32 states of each.
    states = 8 * 256 * (4 * 2 * 512 + 3 * (512 + 1024))
    assert paged.trace.paged == states
    moved = fixed.low_bytes - paged.low_bytes
    assert moved == pytest.approx(states / (1 + OVER["cuda"]), abs=2)

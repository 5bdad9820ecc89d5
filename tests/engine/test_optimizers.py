"""States of paged optimizers go back into paged memory; others are left alone."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lightning_peft import engine


def test_other_optimizers_are_left_alone() -> None:
    layer = nn.Linear(400, 400)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 400)).sum().backward()
    optimizer.step()
    before = {id(v) for state in optimizer.state.values() for v in state.values()}
    assert engine.restore_paging(optimizer) == 0
    assert {id(v) for state in optimizer.state.values() for v in state.values()} == before


def test_states_on_the_cpu_are_left_alone() -> None:
    layer = nn.Linear(400, 400)
    optimizer = bnb.optim.PagedAdamW32bit(layer.parameters())
    assert optimizer.is_paged
    optimizer.state[layer.weight]["state1"] = torch.zeros(400, 400)
    assert engine.restore_paging(optimizer) == 0


@pytest.mark.gpu
def test_a_resumed_paged_optimizer_is_paged_again() -> None:
    layer = nn.Linear(400, 400, device="cuda")

    def steps(optimizer: bnb.optim.PagedAdamW32bit, count: int) -> None:
        for _ in range(count):
            layer(torch.ones(2, 400, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    first = bnb.optim.PagedAdamW32bit(layer.parameters())
    steps(first, 2)
    saved = copy.deepcopy(first.state_dict())
    second = bnb.optim.PagedAdamW32bit(layer.parameters())
    second.load_state_dict(saved)
    assert engine.restore_paging(second) == 2
    state = second.state[layer.weight]
    assert all(getattr(state[name], "is_paged", False) for name in ("state1", "state2"))
    for name in ("state1", "state2"):
        assert torch.equal(state[name].cpu(), first.state[layer.weight][name].cpu())
    steps(second, 1)

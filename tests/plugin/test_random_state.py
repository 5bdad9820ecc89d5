"""The state of the random generators, on as many GPUs as before and on another number."""

import torch

from lightning_peft.plugin.random_state import random_state, set_random_state


def test_numbers_come_again(monkeypatch):
    state = random_state()
    drawn = torch.rand(4)
    set_random_state(state)
    assert torch.equal(torch.rand(4), drawn)


def test_another_number_of_gpus_keeps_the_generator_of_the_process(monkeypatch):
    states = [torch.full((2,), value, dtype=torch.uint8) for value in (1, 2, 3)]
    found = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", found.append)
    state = random_state()
    for count in (3, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        set_random_state(state)
    assert [one[0].tolist() for one in found[:1]] == [[1, 1]]
    assert found[1].tolist() == [2, 2]

"""Methods whose layers share random projections: drawn again, and never another's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import CheckpointError

from . import bases
from .reference import randomize, relative_error

CONFIGS = {
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["one", "two"]),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["one", "two"]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_folder_of_peft_that_holds_them_fits_only_if_they_are_the_same(method, tmp_path):
    net, x = bases.linear()
    theirs = get_peft_model(copy.deepcopy(net), CONFIGS[method]())
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = copy.deepcopy(net)
    lightning_peft.load_adapter(mine, tmp_path / "theirs")
    assert relative_error(mine(x), theirs(x)) < 1e-6
    lightning_peft.save_adapter(mine, tmp_path / "mine")
    again = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "mine")
    assert relative_error(again(x), theirs(x)) < 1e-6
    for name, buffer in theirs.named_buffers():
        if name.endswith("_A.default"):
            buffer[..., 0, 0] += 1.0
    theirs.save_pretrained(tmp_path / "others")
    other = copy.deepcopy(net)
    with pytest.raises(CheckpointError, match=r"other random projections \(\w+_A\) .*key=0"):
        lightning_peft.load_adapter(other, tmp_path / "others")
    assert other.state_dict().keys() == net.state_dict().keys()


def test_the_config_that_was_given_is_left_alone():
    config = CONFIGS["VeRA"]()
    net, _ = bases.linear()
    lightning_peft.inject(net, config)
    assert config.save_projection is True
    assert not any("vera_A" in name for name in engine.trainable_state_dict(net))
    buffers = engine.adapter_buffers(net)
    assert {key for _, key, _ in buffers} == {"default"}
    assert all(holder[key] is value for holder, key, value in buffers)
    assert {value.dtype for _, _, value in buffers} == {torch.float32}

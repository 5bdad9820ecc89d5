"""Running statistics that training changed are in adapter folders, and PEFT reads them too."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import lightning_peft
from lightning_peft.errors import CheckpointError


class Normalized(nn.Module):
    """A layer to adapt, batch norm, and a head."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)) * self.mask)


def trained():
    """Returns the base and the same with an adapter, after steps in train mode."""
    torch.manual_seed(0)
    base = Normalized().requires_grad_(False)
    model = copy.deepcopy(base)
    lightning_peft.inject(model, r=2, target_modules=["layer"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model.train()(5 + 3 * torch.randn(16, 6)).pow(2).mean().backward()
        optimizer.step()
    return base.eval(), model.eval()


def test_an_adapter_comes_back_with_the_statistics_it_was_trained_with(tmp_path):
    base, model = trained()
    lightning_peft.save_adapter(model, tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    held = {key.removeprefix("base_model.model.") for key in file}
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= held
    assert "mask" not in held
    x = torch.randn(4, 6)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x))
    again = copy.deepcopy(base)
    lightning_peft.load_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(x), model(x))
    # Saved once more, the statistics are still there.
    lightning_peft.save_adapter(again, tmp_path / "again")
    torch.testing.assert_close(
        load_file(tmp_path / "again" / "adapter_model.safetensors"),
        load_file(tmp_path / "adapter_model.safetensors"),
    )


def test_statistics_that_stayed_are_not_written(tmp_path):
    base = Normalized()
    lightning_peft.inject(base, r=2, target_modules=["layer"])
    base.norm.eval()
    base(torch.randn(4, 6))
    lightning_peft.save_adapter(base, tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "running" in k]


def test_a_second_adapter_with_other_statistics_is_refused(tmp_path):
    base, model = trained()
    lightning_peft.save_adapter(model, tmp_path)
    lightning_peft.inject(base, r=2, target_modules=["layer"], adapter_name="first")
    with pytest.raises(CheckpointError, match="norm.running_mean: the file brings other values"):
        lightning_peft.load_adapter(base, tmp_path, adapter_name="second")


def test_buffers_inside_of_a_layer_that_peft_wraps(tmp_path):
    """The vectors of an older spectral norm move with each step in train mode."""

    def built():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))

    model = built()
    lightning_peft.inject(model, r=2, target_modules=["0"])
    for _ in range(3):
        model(torch.randn(4, 6))
    lightning_peft.save_adapter(model, tmp_path)
    again, x = built(), torch.randn(4, 6)
    lightning_peft.load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    theirs = PeftModel.from_pretrained(built(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x))

"""Layers whose weight was replaced by one of another shape."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import LifecycleError, UnsupportedError

from .reference import randomize, refused, relative_error


class Pruned(nn.Module):
    """A layer that says 16 outputs and has 12, and a vocabulary that says 5 and has 9."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.words.weight = nn.Parameter(torch.randn(9, 8))
        self.first = nn.Linear(8, 16)
        self.first.weight = nn.Parameter(torch.randn(12, 8))
        self.first.bias = nn.Parameter(torch.zeros(12))
        self.second = nn.Linear(12, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.words(ids)).relu()).relu())


@pytest.mark.parametrize("quantization", [None, engine.quantization_config()], ids=["lora", "q"])
def test_sizes_are_those_of_the_weight(quantization, tmp_path) -> None:
    torch.manual_seed(0)
    model, ids = Pruned(), torch.tensor([[0, 8], [3, 7]])
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["words", "first", "second"]
    given = {"target_modules": names, "quantization_config": quantization}
    lightning_peft.inject(model, r=2, **given)
    assert model.first.lora_B["default"].weight.shape == (12, 2)
    assert model.words.lora_embedding_A["default"].shape == (2, 9)
    assert (model.first.out_features, model.words.num_embeddings) == (16, 5)
    model(ids).sum().backward()
    assert model.first.lora_B["default"].weight.grad.shape == (12, 2)
    randomize(model)
    output = model(ids)
    lightning_peft.save_adapter(model, tmp_path)
    again = Pruned()
    again.load_state_dict(plain)
    lightning_peft.load_adapter(again, tmp_path, quantization_config=quantization)
    assert torch.equal(again(ids), output)
    lightning_peft.inject(model, r=3, target_modules=names, adapter_name="second")
    assert model.first.lora_B["second"].weight.shape == (12, 3)
    lightning_peft.merge(model)
    assert relative_error(model(ids), output) < 1e-5


def test_a_convolution_of_another_shape_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    model[1].weight = nn.Parameter(torch.randn(5, 4, 3, 3))
    with refused(model, UnsupportedError, r"1: its weight .* of shape \(5, 4, 3, 3\)") as e:
        lightning_peft.inject(model, r=2)
    e.match(r"says that it is \(4, 4, 3, 3\).* or leave it out by `exclude_modules`")


def test_peft_wrappers_use_the_declared_sizes() -> None:
    with pytest.raises(UnsupportedError, match=r"first: its weight was replaced by one of shape"):
        lightning_peft.inject(Pruned(), LoraConfig(r=2, lora_bias=True))


def test_declared_sizes_of_transposed_and_grouped_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 2, (1, 3))
    )
    report = lightning_peft.inject(model, r=2, target_modules=["0", "1", "2"])
    assert sum(report.parts[0].adapted.values()) == 3


def test_lazy_layers_without_weights_are_named() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(LifecycleError, match=r"first batch:\n  - 0.weight"):
        lightning_peft.inject(model, r=2)
    model(torch.zeros(1, 3))
    lightning_peft.inject(model, r=2)


def test_a_lazy_head_outside_of_what_is_adapted_waits_for_its_batch() -> None:
    model = nn.ModuleDict({"base": nn.Sequential(nn.Linear(3, 4)), "head": nn.LazyLinear(2)})
    lightning_peft.inject(model, r=2, adapt="base", target_modules=["0"])
    model["head"](model["base"](torch.zeros(1, 3))).sum().backward()
    assert model["head"].weight.grad is not None

"""Code that puts other tensors in the place of frozen weights is stopped before it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers import BitsAndBytesConfig

import lightning_peft
from lightning_peft.errors import UnsupportedError

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
MESSAGE = "of an adapted or quantized layer would be replaced"


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


WAYS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned in rows": lambda layer: prune.random_structured(layer, "weight", 0.5, 0),
    "bias pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.3),
    "weight norm": parametrizations.weight_norm,
    "old weight norm": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "deleted": lambda layer: delattr(layer, "weight"),
    "made a parameter": lambda layer: nn.Parameter(layer.weight),
}


def adapted(quantized: bool) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    settings = {"quantization_config": NF4} if quantized else {}
    lightning_peft.inject(module, r=2, target_modules=["0"], **settings)
    nn.init.normal_(module[0].lora_B["default"].weight)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_late_changes_are_refused(way, quantized):
    module = adapted(quantized)
    x = torch.randn(4, 8)
    before, names = module(x), list(dict(module.named_parameters()))
    with pytest.raises(UnsupportedError, match=MESSAGE):
        WAYS[way](module[0])
    if way != "old weight norm":
        # That one has taken the weight off the layer by then.
        assert torch.equal(module(x), before)
        assert list(dict(module.named_parameters())) == names


def test_a_spectral_norm_of_the_old_kind():
    with pytest.raises(UnsupportedError, match=MESSAGE):
        spectral_norm(adapted(False)[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_scripts_are_refused_and_traces_are_not(quantized):
    module, x = adapted(quantized), torch.randn(4, 8)
    with pytest.raises(UnsupportedError, match="merge and unload first, or trace"):
        torch.jit.script(module)
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_codes_do_not_become_dense():
    layer = adapted(True)[0]
    with pytest.raises(UnsupportedError, match=f"weight {MESSAGE}"):
        layer.weight = nn.Parameter(torch.zeros(8, 8))
    assert layer(torch.ones(1, 8)).any()


@pytest.mark.parametrize("quantized", [False, True])
def test_heads_and_copies_of_values_may_change(quantized):
    module = adapted(quantized)
    parametrizations.weight_norm(module[2])
    prune.l1_unstructured(module[2], "bias", 1)
    assert module(torch.randn(4, 8)).shape == (4, 3)
    copied = nn.Parameter(module[0].weight.detach().clone())
    torch.testing.assert_close(copied.data, module[0].weight + 0)
    module[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert module[0].scale.item() == 1

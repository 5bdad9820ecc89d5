"""PEFT's initialisations keep the model's output, or are refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import UnsupportedError

from .reference import injected, output_of, refused, relative_error

NF4 = engine.quantization_config()


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_output_stays_on_a_dense_base(init: str, use_rslora: bool) -> None:
    model, batch = tiny_llama(), token_batch()
    before, weights = output_of(model, batch), values(model)
    lightning_peft.inject(model, r=4, init_lora_weights=init, use_rslora=use_rslora)
    assert relative_error(output_of(model, batch), before) < 2e-5
    target = "model.layers.0.self_attn.q_proj.weight"
    rewritten = not torch.equal(model.state_dict()[target], weights[target])
    assert rewritten is init.startswith(("pissa", "olora"))


@pytest.mark.parametrize("build", [tiny_gpt2, stack])
def test_pissa_knows_the_orientation_of_the_weight(build) -> None:
    model = build()
    batch = torch.randn(3, 96) if isinstance(model, type(stack())) else token_batch()
    before = output_of(model, batch)
    lightning_peft.inject(model, r=4, init_lora_weights="pissa")
    assert relative_error(output_of(model, batch), before) < 2e-5


@pytest.mark.parametrize(("init", "share"), [("pissa", 0.5), ("olora", 1.5)])
def test_output_stays_near_when_the_residual_is_quantized(init: str, share: float) -> None:
    """The residual, not the original weight, is quantized.

    PiSSA's residual is small, so that less is lost than by quantizing the weight (arXiv
    2404.02948); OLoRA's is as large as the weight.
    """

    def low_rank() -> nn.Module:
        torch.manual_seed(1)
        model = stack()
        for layer in (model.first, model.second):
            left, right = torch.randn(layer.out_features, 4), torch.randn(4, layer.in_features)
            layer.weight.data += left @ right / 8
        return model

    x, errors = torch.randn(16, 96), {}
    for kind in (True, init):
        model = low_rank()
        before = output_of(model, x)
        lightning_peft.inject(model, r=8, init_lora_weights=kind, quantization_config=NF4)
        errors[kind] = relative_error(output_of(model, x), before)
    assert errors[init] < share * errors[True]
    assert errors[init] > 1e-4, "nothing was quantized"


def test_a_record_of_the_rewritten_base_is_kept() -> None:
    model = injected(stack(), r=4, init_lora_weights="pissa", quantization_config=NF4)
    entry = engine.require_record(model).parts[""]
    assert entry.changed_base is not None
    assert entry.changed_base.names == entry.base.names
    rewritten = entry.base.differences(entry.changed_base.sums)
    assert rewritten == ["first.weight", "second.weight"]


def shared_layers() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 2)})
    model["b"].weight = model["a"].weight
    return model


def quantized_layer() -> nn.Module:
    model = injected(stack(), r=2, quantization_config=NF4)
    return lightning_peft.unload(model)


REFUSED = {
    "odd rank": (stack, {"r": 3, "init_lora_weights": "orthogonal"}, "needs an even rank, not 3"),
    "pattern": (
        stack,
        {"r": 4, "init_lora_weights": "orthogonal", "rank_pattern": {"second": 5}},
        "second: 'orthogonal' needs an even rank, not 5",
    ),
    "large rank": (stack, {"r": 65, "init_lora_weights": "pissa"}, "takes 65 singular vectors"),
    "conv1d": (tiny_gpt2, {"init_lora_weights": "olora"}, "takes a Conv1D weight transposed"),
    "shared": (shared_layers, {"r": 2, "init_lora_weights": "pissa"}, "other layers share"),
    "meta": (
        lambda: stack().to("meta"),
        {"r": 2, "init_lora_weights": "pissa"},
        "no values on the meta device",
    ),
    "quantized": (
        quantized_layer,
        {"r": 2, "init_lora_weights": "pissa"},
        "the layer is quantized already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_initialisations_are_refused_before_any_change(case: str) -> None:
    build, settings, message = REFUSED[case]
    model = build()
    with refused(model, UnsupportedError, message):
        lightning_peft.inject(model, **settings)

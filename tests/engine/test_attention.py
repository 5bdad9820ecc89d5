"""LoRA on ``nn.MultiheadAttention`` in place, whose weights are read by the code around it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.engine.layers import weight_view
from lightning_peft.engine.layers.adapter import without_adapters
from lightning_peft.engine.layers.attention import times_added
from lightning_peft.errors import CheckpointError, UnsupportedError

from .reference import adapted, injected, refused, relative_error

NF4 = engine.quantization_config()
NAMED = {"target_modules": ["self_attn", "linear1", "linear2"]}


class Encoder(nn.Module):
    """Torch's own encoder, and a head."""

    def __init__(self, **settings: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True, **settings)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": NF4}], ids=["dense", "nf4"])
def test_an_encoder_trains_everywhere(quantized: dict, tmp_path: Path) -> None:
    model, x = adapted(encoder, r=2, **NAMED, **quantized), torch.randn(2, 5, 64)
    output = model.train()(x)
    output.square().sum().backward()
    params = engine.adapter_parameters(model)
    assert len(params) == 2 * 2 * 4
    assert all(param.grad.any() for param in params.values())
    with torch.no_grad():
        assert relative_error(model.eval()(x), output) < 1e-5
    model.eval()
    attention = model.encoder.layers[0].self_attn
    a, b = (getattr(attention, name)["default"].weight for name in ("lora_A", "lora_B"))
    stored = attention._parameters["in_proj_weight"]
    assert stored.dtype == (torch.uint8 if quantized else torch.float32)
    with without_adapters(attention):
        expected = attention.effective_weight() + 2.0 * b @ a
    assert relative_error(attention.in_proj_weight + 0, expected) < 1e-6
    lightning_peft.save_adapter(model, tmp_path)
    again = encoder().eval()
    lightning_peft.load_adapter(again, tmp_path, is_trainable=True, **quantized)
    assert relative_error(again(x), output) < 1e-5
    fresh = encoder().eval()
    engine.inject_as_described(fresh, engine.describe(model))
    engine.load_trainable_state_dict(fresh, engine.trainable_state_dict(model))
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(other(x), output) < 1e-5
    lightning_peft.merge(model)
    assert relative_error(model(x), output) < 1e-5
    lightning_peft.unmerge(model)
    made = lightning_peft.verify(model, x, lambda module, batch: module(batch).square().mean())
    assert made.passed, made
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model.encoder.layers[1].self_attn) is nn.MultiheadAttention
    assert relative_error(model(x), output) < 1e-5


@pytest.mark.parametrize("shared", [3, 2, 1], ids=["self", "cross", "three inputs"])
def test_no_weight_is_kept_until_the_backward_pass(shared: int, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = injected(
        nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "head": nn.Linear(64, 2)}),
        r=2,
        target_modules=["attention"],
        init_lora_weights=False,
    )
    inputs = [torch.randn(3, 2, 64, requires_grad=True) for _ in range(4 - shared)]
    inputs += [inputs[-1]] * (shared - 1)
    trained = [*inputs, *engine.adapter_parameters(model).values()]

    def gradients() -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model["attention"](*inputs)[0]
        first = torch.autograd.grad(output.square().sum(), trained, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), trained)
        return [output, *first, *second], max(kept.values())

    found, largest = gradients()
    monkeypatch.setattr(weight_view, "_is_weight_alone", lambda *_: False)
    expected, before = gradients()
    assert largest < 64 * 64 <= before
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_the_projection_counts_as_often_as_in_peft() -> None:
    model = injected(encoder(), r=2, **NAMED)
    attention = model.encoder.layers[0].self_attn
    once = attention.adapter_settings["default"].scaling
    state = torch.random.get_rng_state()
    times_added.cache_clear()
    assert attention.out_proj.adapter_settings["default"].scaling == times_added() * once
    assert torch.random.get_rng_state().equal(state)


def test_files_of_a_peft_that_counts_otherwise_are_refused(tmp_path: Path) -> None:
    model = injected(encoder(), r=2, **NAMED)
    described = engine.describe(model)
    saved = described["parts"][""]["adapters"]["default"]
    assert saved["projection_scale"] == times_added()
    engine.check_description(model, described)
    saved["projection_scale"] = other = times_added() + 1
    with pytest.raises(CheckpointError, match=f"out_proj behind attentions count {other} times"):
        engine.check_description(model, described)
    lightning_peft.save_adapter(model, tmp_path)
    facts = tmp_path / "provenance.json"
    written = json.loads(facts.read_text())
    assert written["projection_scale"] == times_added()
    facts.write_text(json.dumps(written | {"projection_scale": other}))
    fresh = encoder()
    with refused(fresh, CheckpointError, f"out_proj behind attentions count {other} times"):
        lightning_peft.load_adapter(fresh, tmp_path)


def test_what_an_attention_does_not_take_is_refused() -> None:
    model = nn.ModuleDict({"mix": nn.MultiheadAttention(8, 2, kdim=4), "head": nn.Linear(8, 2)})
    with refused(model, UnsupportedError, r"mix: an attention is adapted in place(.|\n)*kdim"):
        lightning_peft.inject(model, r=2, target_modules=["mix"])
    model = encoder()
    with refused(model, UnsupportedError, "an attention is adapted in place"):
        lightning_peft.inject(model, LoraConfig(target_modules=["self_attn"], use_dora=True))
    with refused(model, UnsupportedError, "rows are those of a linear layer"):
        lightning_peft.inject(model, target_modules=["self_attn[q]"])


def test_folders_keep_attentions_as_they_were_in_training(tmp_path: Path) -> None:
    model = injected(encoder(), r=2, **NAMED, quantization_config=NF4)
    lightning_peft.save_adapter(model, tmp_path)
    # As versions wrote it that could not quantize attentions.
    written = tmp_path / "provenance.json"
    facts = json.loads(written.read_text())
    assert facts["base"].pop("quantized_attentions")
    written.write_text(json.dumps(facts))
    fresh = encoder()
    lightning_peft.load_adapter(fresh, tmp_path, quantization_config=NF4)
    attention = fresh.encoder.layers[0].self_attn
    assert attention._parameters["in_proj_weight"].dtype == torch.float32
    assert is_quantized(fresh.encoder.layers[0].linear1)
    described = engine.describe(model)
    for part in described["parts"].values():
        del part["base_id"]["quantized_attentions"]
    engine.inject_as_described(again := encoder(), described)
    stored = again.encoder.layers[0].self_attn._parameters["in_proj_weight"]
    assert stored.dtype == torch.float32
    with pytest.raises(CheckpointError, match="in_proj_weight of attentions is dense in the check"):
        engine.check_description(model, described)

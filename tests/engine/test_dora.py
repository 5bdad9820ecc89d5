"""DoRA in place: the numbers of PEFT's own layers, over any base and for as long as LoRA lives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import stack, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.layers import dora
from lightning_peft.engine.layers.dora import DoraLayer
from lightning_peft.engine.meta import inject_on_meta
from lightning_peft.errors import UnsupportedError

from .reference import (
    merged_by_weight,
    output_of,
    randomize,
    refused,
    relative_error,
    without_repacking,
)

BATCH = {"input_ids": torch.arange(14).view(2, 7) % 61}
NF4 = engine.quantization_config(None)
INT8 = engine.quantization_config(None, load_in_8bit=True)
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "use_dora": True, "target_modules": TARGETS, **changes})


def adapted(quantization: Any = None, trained: bool = True, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_llama()
    lightning_peft.inject(model, config(**changes), quantization_config=quantization)
    if trained:
        train(model, 3)
    return model


def train(model: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**BATCH, labels=BATCH["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ten_steps_are_those_of_peft(dropout: float) -> None:
    torch.manual_seed(0)
    base, losses, models = tiny_llama(), [], []
    for make in (get_peft_model, lambda model, given: lightning_peft.inject(model, given)):
        model = copy.deepcopy(base)
        torch.manual_seed(1)
        wrapped = make(model, config(lora_dropout=dropout))
        models.append(wrapped if isinstance(wrapped, PeftModel) else model)
        losses.append(train(models[-1].train(), 10))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert losses[0][0] - losses[0][-1] > 0.2
    outputs = [output_of(model.eval(), BATCH) for model in models]
    assert relative_error(*outputs) < 1e-4


def test_over_four_bits_it_is_what_peft_makes_of_the_same_codes() -> None:
    ours = adapted(NF4, trained=False)
    for layer in ours.modules():
        if isinstance(layer, DoraLayer):
            # Of the dequantized weight.
            weight = super(dora.AdapterLayer, layer).effective_weight()
            norms = layer.outputs_as_rows(weight).norm(dim=1)
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].data, norms)
    torch.manual_seed(0)
    theirs = tiny_llama()
    lightning_peft.inject(theirs, r=1, quantization_config=NF4)
    lightning_peft.unload(theirs)
    theirs = without_repacking(get_peft_model(theirs, config()))
    assert copy_adapter_to(theirs, ours) > 10
    losses = [train(model, 10) for model in (theirs, ours)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def copy_adapter_to(theirs: PeftModel, ours: nn.Module) -> int:
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "magnitude" in name:
                plain = name.removeprefix("base_model.model.").removesuffix(".weight")
                torch.testing.assert_close(value, ours.get_parameter(plain))
    factors = {n: p for n, p in theirs.named_parameters() if "magnitude" not in n}
    mine = engine.adapter_parameters(ours)
    for name in [name for name in mine if "magnitude" not in name]:
        factors[f"base_model.model.{name}"].data.copy_(mine[name])
    return len(mine)


@pytest.mark.parametrize("base", [None, NF4, INT8], ids=["dense", "nf4", "int8"])
def test_it_starts_as_the_base_is_verified_and_merges(base: Any) -> None:
    result = lightning_peft.verify(adapted(base, trained=False), token_batch())
    assert result.passed, str(result)
    assert "no effect before training: loss differs by" in str(result)
    model = adapted(base).eval()
    before, expected = copy.deepcopy(model.state_dict()), output_of(model, BATCH)
    report = lightning_peft.merge(model)
    assert report.worst_error < 1e-5
    assert relative_error(output_of(model, BATCH), expected) < (0.02 if base is INT8 else 1e-5)
    lightning_peft.unmerge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key].double(), value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [None, NF4], ids=["dense", "nf4"])
def test_a_folder_is_merged_weight_by_weight(base: Any, tmp_path: Any) -> None:
    model = adapted(base, target_modules=["q_proj", "down_proj"])
    merged, _ = merged_by_weight(model, tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(merged[name], value)


def test_norms_need_no_sum_of_the_weights() -> None:
    rows, a, b = torch.randn(24, 40), torch.randn(3, 40), torch.randn(24, 3)
    expected = (rows + b @ a).norm(dim=1)
    torch.testing.assert_close(dora.row_norms(rows, a, b), expected)
    low = dora.row_norms(rows.bfloat16(), a, b)
    torch.testing.assert_close(low, (rows.bfloat16() + b @ a).norm(dim=1), rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    "more",
    [{"padding": 1, "padding_mode": "circular"}, {"dilation": 2}, {"bias": False, "stride": 2}],
)
def test_convolutions_are_those_of_the_changed_kernel(more: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, **more), nn.Conv2d(6, 2, 1))
    lightning_peft.inject(net, config(target_modules=["0"]))
    randomize(net)
    layer, x = net[0], torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
        scaling = layer.adapter_settings["default"].scaling
        added = torch.einsum("or,rihw->oihw", b[..., 0, 0], a) * scaling
        changed = layer._parameters["weight"] + added
        norms = changed.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        kernel = layer.lora_magnitude_vector["default"].view(-1, 1, 1, 1) / norms * changed
        plain = nn.Conv2d(4, 6, 3, **more)
        plain.weight.copy_(kernel)
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
        torch.testing.assert_close(net[0](x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.weight + 0, kernel, rtol=1e-4, atol=1e-6)


def test_a_class_with_a_forward_pass_of_its_own_computes_with_the_changed_weight() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * F.linear(input, self.weight)

    net = nn.Sequential(Doubled(6, 4, bias=False), nn.Linear(4, 2))
    lightning_peft.inject(net, config(target_modules=["0"]))
    randomize(net)
    x = torch.randn(3, 6)
    expected = net[0].effective_weight()
    torch.testing.assert_close(net[0](x), 2 * x @ expected.T)
    net[0](x).sum().backward()
    assert net[0].lora_magnitude_vector["default"].grad.abs().min() > 0


def test_several_adapters_add_up_and_come_off_again() -> None:
    model, x = stack(), torch.randn(5, 96)
    base = model.first.weight.detach().clone()
    for name in ("default", "second"):
        lightning_peft.inject(model, config(target_modules=["first"]), adapter_name=name)
    randomize(model)
    layer = model.first
    changes = [layer.delta_weight(name, base) for name in ("default", "second")]
    lightning_peft.set_adapter(model, ["default", "second"])
    expected = F.linear(x, base + sum(changes), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    lightning_peft.merge(model)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    lightning_peft.unmerge(model)
    torch.testing.assert_close(layer.stored_weight().data, base, rtol=1e-4, atol=1e-5)


def test_what_is_merged_comes_off_on_another_device() -> None:
    model = adapted()
    lightning_peft.merge(model)
    for layer in engine.adapted_layers(model).values():
        # A product with a tensor of the CPU would raise.
        weight = layer.stored_weight().to("meta")
        assert layer.restored_weight(weight, ["default"]).is_meta
        assert layer.summed_delta(weight, ["default"]).is_meta


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_weights_without_a_direction_are_refused(kind: str) -> None:
    net = nn.ModuleDict({"table": nn.Embedding(7, 6), "layer": nn.Linear(6, 4)})
    with torch.no_grad():
        net["table"].weight[:, 2] = 0
        net["layer"].weight[1] = 0
    name, count = ("layer", "1 of 4") if kind == "linear" else ("table", "1 of 6")
    with refused(net, UnsupportedError, rf"{name}: {count} outputs have weights of zero"):
        lightning_peft.inject(net, config(target_modules=[name]))


def test_transposed_convolutions_are_refused_by_name() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1))
    with refused(net, UnsupportedError, "0: DoRA has no form on transposed convolutions"):
        lightning_peft.inject(net, config(target_modules=["0", "1"]))


def test_a_model_that_peft_wrapped_is_taken_over() -> None:
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_llama(), config())
    randomize(wrapped)
    expected = output_of(wrapped, BATCH)
    holder = nn.ModuleDict({"model": wrapped.base_model.model})
    lightning_peft.inject(holder)
    assert isinstance(holder["model"].model.layers[0].mlp.down_proj, DoraLayer)
    assert relative_error(output_of(holder["model"], BATCH), expected) < 1e-5


def test_norms_are_computed_once_for_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(NF4).eval(), []
    norms = DoraLayer.norms
    monkeypatch.setattr(DoraLayer, "norms", lambda *args: calls.append(1) or norms(*args))
    with torch.no_grad():
        expected = output_of(model, BATCH)
        calls.clear()
        with engine.ready_for_inference(model):
            for _ in range(3):
                torch.testing.assert_close(output_of(model, BATCH), expected)
    assert len(calls) == 5
    assert not any("kept_factors" in vars(layer) for layer in model.modules())


def test_training_after_inference_mode() -> None:
    model = adapted(NF4)
    with torch.inference_mode():
        output_of(model, BATCH)
    assert train(model, 2)


@pytest.mark.long
def test_the_compiler_gets_the_same_numbers() -> None:
    layer, x = stack(), torch.randn(4, 96)
    lightning_peft.inject(layer, config(target_modules=["first"]))
    randomize(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_bases_stay_near_float32(dtype: torch.dtype) -> None:
    model = adapted()
    expected = output_of(model.eval(), BATCH)
    with torch.autocast("cpu", dtype):
        assert relative_error(output_of(model, BATCH), expected) < 0.02
    half = tiny_llama().to(dtype)
    lightning_peft.inject(half, config())
    with lightning_peft.disable_adapters(half):
        base = output_of(half, BATCH)
    assert relative_error(output_of(half, BATCH), base) < 0.01


def test_the_planner_counts_magnitudes() -> None:
    with torch.device("meta"):
        outline = tiny_llama()
    inject_on_meta(outline, config(target_modules=["q_proj"]))
    real = adapted(trained=False, target_modules=["q_proj"])
    plain = adapted(trained=False, target_modules=["q_proj"], use_dora=False)
    counts = [
        sum(param.numel() for param in engine.adapter_parameters(one).values())
        for one in (outline, real, plain)
    ]
    width = real.model.layers[0].self_attn.q_proj.out_features
    assert counts[0] == counts[1] == counts[2] + 2 * width


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_folders_of_rewritten_bases_are_for_the_base_as_it_was(init: str, tmp_path: Any) -> None:
    model = adapted(init_lora_weights=init, target_modules=["q_proj"])
    lightning_peft.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert relative_error(output_of(theirs, BATCH), output_of(model, BATCH)) < 1e-4

"""A backend that lives in one file of the tests does everything that the built-in ones do."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_backend import TOY, ToyConfig, ToyLayer
from transformers import LlamaForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.engine.backends.bnb4 import FOUR_BIT
from lightning_peft.engine.backends.bnb8 import EIGHT_BIT
from lightning_peft.engine.backends.registry import (
    backend_for,
    backend_of,
    checked_config,
    quantization_constants,
    quantization_from_dict,
    quantization_to_dict,
    recorded_backend,
    storage_bytes,
)
from lightning_peft.engine.fingerprint import checksum
from lightning_peft.errors import BaseMismatchError, ConfigError, UnsupportedError
from lightning_peft.plan.prediction import plan_memory

from .reference import output_of, randomize, relative_error

CONFIGS = {
    "toy": (ToyConfig(), TOY),
    "nf4": (engine.quantization_config(), FOUR_BIT),
    "int8": (engine.quantization_config(load_in_8bit=True), EIGHT_BIT),
}
BATCH = {"input_ids": torch.arange(14).view(2, 7) % 61}
EACH = pytest.mark.parametrize(("config", "backend"), CONFIGS.values(), ids=CONFIGS)


def adapted(build=tiny_llama, seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    given = {"quantization_config": ToyConfig(), **settings}
    lightning_peft.inject(model, **({"r": 4} if "peft_config" not in given else {}), **given)
    return model


def weight_of(config, features: tuple[int, int] = (96, 64)) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(*features)
    dense = layer.weight.detach().clone()
    engine.quantize(layer, config)
    return layer, dense


@EACH
def test_each_config_has_one_backend_and_comes_back_from_a_record(config, backend):
    assert backend_for(config) is backend
    fields = quantization_to_dict(config)
    again = quantization_from_dict(fields)
    assert type(again) is type(config)
    assert quantization_to_dict(again) == fields
    assert recorded_backend(fields) is backend


@EACH
def test_a_parameter_is_what_its_tensors_say(config, backend):
    layer, dense = weight_of(config)
    stored = layer._parameters["weight"]
    assert backend_of(stored) is backend
    assert backend.weight_info(stored)[0] == (64, 96)
    assert relative_error(backend.dequantize(stored, torch.float32), dense) < 0.12
    assert layer.effective_weight().dtype == torch.float32
    tensors = {key: value.clone() for key, value in backend.state_tensors(stored).items()}
    again = backend.from_state_tensors(tensors, torch.device("cpu"))
    assert torch.equal(backend.dequantize(again), backend.dequantize(stored))
    assert checksum(again) == checksum(stored)
    meta = backend.meta(dense.to("meta"), config)
    assert storage_bytes(meta) == storage_bytes(stored)
    empty = backend.map_tensors(meta, torch.empty_like)
    assert [c.shape for c in quantization_constants(empty)] == [
        c.shape for c in quantization_constants(stored)
    ]
    assert backend.stored_bytes(64 * 96, config) <= storage_bytes(stored)


@EACH
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_layer_compute_the_same(config, backend, way):
    layer, _ = weight_of(config)
    again = way(layer)
    x = torch.randn(3, 96)
    assert torch.equal(again(x), layer(x))
    assert backend_of(again._parameters["weight"]) is backend
    assert again._parameters["weight"] is not layer._parameters["weight"]


@EACH
def test_a_copied_weight_stays_the_one_that_others_hold(config, backend):
    layer, _ = weight_of(config)
    copied, (weight,) = copy.deepcopy((layer, [layer._parameters["weight"]]))
    assert copied._parameters["weight"] is weight
    # bitsandbytes would keep the codes a second time.
    assert getattr(weight, "CB", None) is None


def test_configs_of_nobody_are_refused():
    with pytest.raises(
        ConfigError, match="config=4: there is no quantization backend for int. .*ToyC"
    ):
        engine.quantization_config(4)
    with pytest.raises(ConfigError, match="'higgs': one of .*bitsandbytes, .*toy_int8"):
        engine.quantization_config({"quant_method": "higgs"})
    with pytest.raises(UnsupportedError, match="'nbits': 4}: hqq weights are trained on as from"):
        engine.quantization_config({"quant_method": "hqq", "nbits": 4})
    with pytest.raises(ConfigError, match="levels=200: from 1 to 127"):
        checked_config(ToyConfig(levels=200))
    with pytest.raises(ConfigError, match="levels=0: from 1 to 127"):
        engine.quantization_config({"quant_method": "toy_int8", "levels": 0})


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, stack])
def test_a_third_backend_quantizes_and_trains(build):
    model = adapted(build)
    report = lightning_peft.report(model)
    assert "toy int8, 127 levels" in str(report)
    quantized = [layer for layer in model.modules() if isinstance(layer, ToyLayer)]
    assert len(quantized) == report.parts[0].quantized > 0
    base = [
        backend_of(x._parameters["weight"]).state_tensors(x._parameters["weight"])["codes"]
        for x in quantized
    ]
    before = [codes.clone() for codes in base]
    batch = torch.randn(4, 96) if build is stack else token_batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(4):
        loss = output_of(model, batch).float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, base, before))


def test_a_third_backend_passes_the_verification():
    batch = token_batch()
    batch["labels"] = batch["input_ids"]
    result = lightning_peft.verify(adapted(), batch)
    assert result.passed, str(result)
    assert "14 layers" in str(result)


def test_a_checkpoint_over_a_third_backend_fits_the_same_base_alone():
    model = adapted()
    randomize(model)
    file = io.BytesIO()
    torch.save((engine.trainable_state_dict(model), engine.describe(model)), file)
    file.seek(0)
    state, description = torch.load(file, weights_only=True)
    assert description["parts"][""]["quantization"] == {"quant_method": "toy_int8", "levels": 127}
    torch.manual_seed(0)
    fresh = tiny_llama()
    engine.inject_as_described(fresh, description)
    engine.load_trainable_state_dict(fresh, state)
    assert torch.equal(output_of(fresh, BATCH), output_of(model, BATCH))
    with pytest.raises(BaseMismatchError):
        engine.check_description(adapted(seed=1), description)


STATE_KEYS = {
    "toy": ["weight.dtype", "weight.levels", "weight.scales"],
    "nf4": [
        "weight.absmax",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ],
    "int8": ["SCB", "weight_format"],
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_key_of_a_quantized_weight_is_in_a_checkpoint(kind):
    model = adapted(stack, quantization_config=CONFIGS[kind][0])
    assert sorted(model.first.quantization_keys()) == STATE_KEYS[kind]
    assert {f"first.{key}" for key in STATE_KEYS[kind]} < model.state_dict().keys()
    assert sorted(
        key for key in engine.trainable_state_dict(model) if key.startswith("first.")
    ) == [
        "first.lora_A.default.weight",
        "first.lora_B.default.weight",
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hook_that_loads_quantized_weights_into_a_dense_layer_gets_an_explanation(kind):
    model = adapted(stack, quantization_config=CONFIGS[kind][0])
    base = {k: v for k, v in model.state_dict().items() if "lora" not in k}
    with pytest.raises(RuntimeError, match="Unexpected key") as raised:
        stack().load_state_dict(base)
    explained = engine.explain_hook_error(model, raised.value, ())
    assert "stored weights that are quantized, such as those of 'first'" in str(explained)
    with pytest.raises(RuntimeError, match="Unexpected key") as raised:
        stack().first.load_state_dict(
            {k.removeprefix("first."): v for k, v in base.items() if k.startswith("first.")}
        )
    assert engine.explain_hook_error(model, raised.value, ()) is not None


@pytest.mark.parametrize(
    ("kind", "field"), [("toy", "skip_modules"), ("nf4", "llm_int8_skip_modules")]
)
def test_advice_to_leave_a_layer_dense_names_the_field_of_its_backend(kind, field):
    config = peft.ShiraConfig(r=2, target_modules=["up_proj"])
    with pytest.raises(UnsupportedError, match=f"dense weights only. Name it in `{field}`"):
        adapted(peft_config=config, quantization_config=CONFIGS[kind][0])


def test_an_adapter_folder_is_loaded_onto_the_same_quantization(tmp_path):
    model = adapted()
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = tiny_llama()
    lightning_peft.load_adapter(fresh, tmp_path, quantization_config=ToyConfig())
    assert torch.equal(output_of(fresh, BATCH), output_of(model, BATCH))


def test_a_third_backend_merges_and_comes_back_bit_for_bit():
    model = adapted()
    randomize(model)
    expected = output_of(model, BATCH)
    report = lightning_peft.merge(model)
    assert all(layer.was_quantized for layer in report.layers)
    assert all(0 < layer.requantized_error < 1 for layer in report.layers)
    assert relative_error(output_of(model, BATCH), expected) < 1e-5
    lightning_peft.unmerge(model)
    assert torch.equal(output_of(model, BATCH), expected)
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert relative_error(output_of(model, BATCH), expected) < 1e-5


def test_skipped_modules_and_wrong_names():
    model = adapted(quantization_config=ToyConfig(skip_modules=["down_proj"]))
    names = [n for n, x in model.named_modules() if isinstance(x, ToyLayer)]
    assert len(names) == 12
    assert not any("down_proj" in name for name in names)
    with pytest.raises(
        lightning_peft.errors.TargetModulesError, match="'dwn_proj' of skip_modules"
    ):
        adapted(quantization_config=ToyConfig(skip_modules=["dwn_proj"]))


def test_a_convolution_over_a_third_backend():
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2)
        )

    model = adapted(build, target_modules=["0", "2"])
    weight = model[0].effective_weight()
    x = torch.randn(2, 4, 8, 8)
    assert relative_error(model[0](x), F.conv2d(x, weight, model[0].bias)) < 1e-6
    assert type(model[2]).__name__ == "LoraToyConv2d"


def test_a_backend_for_linear_layers_leaves_kernels_dense(monkeypatch):
    monkeypatch.setattr(type(TOY), "convolution_class", None)

    def build() -> nn.Module:
        linears = nn.Linear(72, 8), nn.Linear(8, 2)
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), *linears)

    model = adapted(build, target_modules=["0", "2"])
    assert [isinstance(layer, ToyLayer) for layer in model] == [False, False, True, False]
    with pytest.raises(UnsupportedError, match="a Conv2d, and toy_int8 is for linear layers only"):
        engine.quantize(nn.Conv2d(4, 8, 3), ToyConfig())


def test_a_model_is_quantized_while_it_is_read(tmp_path):
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path)
    holder = nn.Module()
    config = engine.lora_config(LoRAFields(r=4))
    with engine.loading_for_injection(holder, config, ToyConfig(), None, torch.device("cpu")):
        # Another dtype than the file's, for which streaming saves memory.
        holder.model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert sum(isinstance(layer, ToyLayer) for layer in holder.modules()) == 14
    lightning_peft.inject(holder, config, quantization_config=ToyConfig())
    expected = nn.Module()
    expected.model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    lightning_peft.inject(expected, config, quantization_config=ToyConfig())
    base = engine.record_of(holder).parts["model"].base
    assert base == engine.record_of(expected).parts["model"].base


def test_memory_over_a_third_backend_is_planned():
    model = tiny_llama()
    plan = plan_memory(model, seq_len=16, quantization={"config": ToyConfig()}, device="cpu")
    linear = [x for n, x in model.named_modules() if isinstance(x, nn.Linear) and n != "lm_head"]
    codes = sum(x.weight.numel() for x in linear)
    scales = sum(4 * x.out_features for x in linear)
    assert plan.breakdown["weights_quantized"] == codes + scales


class Renaming(nn.Module):
    """Files have another name for the network."""

    def __init__(self):
        super().__init__()
        self.net = stack()

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {f"model.{name.removeprefix('net.')}": value for name, value in state.items()}


@EACH
def test_no_constant_of_a_renamed_weight_is_in_a_checkpoint(config, backend):
    module = Renaming()
    lightning_peft.inject(module, r=2, quantization_config=config)
    state = engine.trainable_state_dict(module)
    base = {name for name in module.net.state_dict() if name.startswith("first.")}
    assert len(base) > 2
    assert not [name for name in state if name.startswith("model.first.") and "lora" not in name]


@EACH
def test_layers_to_quantize_are_the_same_once_they_are_adapted(config, backend):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 64, 3), nn.Flatten(1, 2), nn.Linear(64, 64), nn.Linear(64, 8)
        )

    plain, planned = build(), build()
    lightning_peft.inject(plain, r=2, target_modules=["0", "2"], quantization_config=config)
    lightning_peft.inject(planned, r=2, target_modules=["0", "2"])
    stored = {name.removesuffix(".weight"): p for name, p in plain.named_parameters()}
    expected = [name for name, p in stored.items() if backend_of(p) is backend]
    assert "2" in expected
    assert engine.quantizable_layers(planned, config) == expected

"""Every method that is injected: over quantized bases, through checkpoints, and where it is not."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
from models import stack
from peft import LoraConfig, get_peft_model
from torch import nn
from toy_backend import ToyConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.configuration import config_differences, config_to_dict
from lightning_peft.engine.injection import with_task_heads
from lightning_peft.engine.layers.probes import probe_input
from lightning_peft.engine.methods.registry import METHODS
from lightning_peft.errors import CheckpointError, UnsupportedError

from . import bases
from .method_rows import METHODS as OPTIONS
from .reference import injected, output_of, refused, relative_error

NF4 = engine.quantization_config(None)
INT8 = engine.quantization_config(None, load_in_8bit=True)
DENSE_ONLY = ("GLoRA", "ShiRA")
OF_LORA = {"DoRA": {"use_dora": True}, "LoRA with a bias": {"lora_bias": True}}


# PEFT imports scikit-learn for it, which takes seconds.
EACH = [
    pytest.param(name, marks=pytest.mark.long) if name in ("AdaMSS", "RandLoRA") else name
    for name in OPTIONS
]
QUANTIZABLE = [*OF_LORA, *(x for x in EACH if x not in DENSE_ONLY)]


def config_of(method: str):
    if method in OF_LORA:
        return LoraConfig(r=4, target_modules=["one", "two"], **OF_LORA[method])
    cls, options = OPTIONS[method]
    return cls(**{"target_modules": ["one", "two"], **next(iter(options.values()))})


def base() -> tuple[nn.Module, torch.Tensor]:
    net, x = bases.square()
    return net.eval().requires_grad_(False), x


def changed(module: nn.Module) -> None:
    with torch.no_grad():
        for param in adapter_parameters(module).values():
            param.add_(torch.randn_like(param) * 0.05)


@pytest.mark.parametrize("method", EACH)
def test_checkpoints_hold_all_of_an_adapter(method: str) -> None:
    net, x = base()
    first, second = copy.deepcopy(net), copy.deepcopy(net)
    lightning_peft.inject(first, config_of(method))
    changed(first)
    torch.manual_seed(7)
    lightning_peft.inject(second, config_of(method))
    engine.load_trainable_state_dict(second, engine.trainable_state_dict(first))
    assert relative_error(second(x), first(x)) < 1e-6
    assert relative_error(first(x), net(x)) > 1e-4


def over_quantized(method: str, settings) -> None:
    net, x = base()
    lightning_peft.inject(net, config_of(method), quantization_config=settings)
    if method in ("DoRA", "IA3", "LoHa", "OFT"):
        verification = lightning_peft.verify(net, x)
        assert verification.passed, verification
    params = adapter_parameters(net)
    assert {param.dtype for param in params.values()} == {torch.float32}
    changed(net)
    expected = net(x)
    expected.pow(2).mean().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in params.values())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    lightning_peft.merge(net)
    assert relative_error(net(x), expected) < 1e-5
    lightning_peft.unmerge(net)
    assert torch.equal(net(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    lightning_peft.merge(net)
    lightning_peft.unload(net)
    assert relative_error(net(x), expected) < 1e-5


@pytest.mark.parametrize("method", QUANTIZABLE)
def test_over_4_bits(method: str) -> None:
    over_quantized(method, NF4)


@pytest.mark.long
@pytest.mark.parametrize("method", QUANTIZABLE)
def test_over_8_bits(method: str) -> None:
    over_quantized(method, INT8)


@pytest.mark.long
@pytest.mark.parametrize("method", QUANTIZABLE)
def test_over_a_third_backend(method: str) -> None:
    over_quantized(method, ToyConfig())


@pytest.mark.parametrize("method", DENSE_ONLY)
def test_methods_for_dense_weights_refuse_quantized_ones(method: str) -> None:
    net, _ = base()
    with refused(net, UnsupportedError, "one is quantized, and .* dense weights only"):
        lightning_peft.inject(net, config_of(method), quantization_config=NF4)


def test_all_methods_that_are_offered_are_compared() -> None:
    types = {str(config_of(name).peft_type.value) for name in OPTIONS}
    assert types | {"LORA", "ADALORA", "TRAINABLE_TOKENS"} == set(METHODS)


def test_decisive_settings() -> None:
    def fields(**changed):
        return config_to_dict(
            peft.FourierFTConfig(**{"n_frequency": 10, "target_modules": ["one"], **changed})
        )

    assert config_differences(fields(), fields(target_modules=["x"], inference_mode=True)) == []
    assert config_differences(fields(), fields(scaling=3.0)) == ["scaling"]
    assert config_differences(fields(), fields(random_loc_seed=1)) == ["random_loc_seed"]
    feedforward = [
        config_to_dict(peft.IA3Config(target_modules=["one", "two"], feedforward_modules=names))
        for names in (["one", "two"], ["two", "one"])
    ]
    assert config_differences(*feedforward) == []


def test_a_folder_with_other_settings_of_a_method_is_refused(tmp_path) -> None:
    net, _ = base()
    other = copy.deepcopy(net)
    method = partial(peft.WaveFTConfig, n_frequency=12, target_modules=["one"])
    lightning_peft.inject(net, method())
    lightning_peft.inject(other, method(scaling=1.0))
    lightning_peft.save_adapter(net, tmp_path)
    with pytest.raises(CheckpointError, match="scaling=25.0 in the file and 1.0 in the module"):
        lightning_peft.load_adapter(other, tmp_path)


# --- options that other programs follow ----------------------------------------------------------


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_task_trains_its_head_as_in_peft(task: str, frozen: bool) -> None:
    model, batch = bases.bert()
    model.requires_grad_(not frozen)
    theirs = get_peft_model(
        copy.deepcopy(model), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    )
    config = LoraConfig(task_type=task, target_modules=["query"])
    lightning_peft.inject(model, config)
    assert config.modules_to_save is None
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    expected = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name, param in theirs.named_parameters()
        if param.requires_grad
    }
    assert trained == expected
    before = output_of(model, batch)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    with lightning_peft.disable_adapters(model):
        assert torch.equal(output_of(model, batch), before)


def test_missing_task_heads_are_ignored() -> None:
    for task in ("SEQ_CLS", "QUESTION_ANS", "CAUSAL_LM", None):
        config = LoraConfig(task_type=task, target_modules=["first"])
        assert with_task_heads(config, stack()) is config
    named = LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier"])
    assert with_task_heads(named, bases.bert()[0]).modules_to_save == ["classifier"]


def test_the_config_that_was_given_keeps_its_spelling() -> None:
    config = LoraConfig(target_modules=["first"], init_lora_weights="GAUSSIAN")
    model = injected(stack(), config)
    assert config.init_lora_weights == "GAUSSIAN"
    assert model.first.lora_A["default"].weight.std() > 0.1


# --- refusals ------------------------------------------------------------------------------------


def test_a_refusal_of_peft_changes_nothing() -> None:
    net, _ = bases.convolution(1)
    net.two = nn.Linear(5, 5)
    with refused(net, UnsupportedError, "PEFT cannot inject HRAConfig into Net: .*Conv1d"):
        lightning_peft.inject(net, peft.HRAConfig(target_modules=["one", "two"]))
    lightning_peft.inject(net, r=2, target_modules=["one", "two"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"dilation": 2}, r"dilation=\(2, 2\)"),
        ({"groups": 2}, "groups=2"),
        ({"stride": (1, 2)}, r"stride=\(1, 2\)"),
        ({"padding": "same"}, "padding='same'"),
    ],
)
def test_convolutions_that_a_method_computes_otherwise(more: dict, said: str) -> None:
    layer = nn.Conv2d(4, 4, 3, **{"padding": 1, **more})
    net = nn.Sequential(layer, nn.Conv2d(4, 4, 1))
    with refused(net, UnsupportedError, f"0 has .*{said}.*another convolution"):
        lightning_peft.inject(net, peft.HRAConfig(target_modules=["0", "1"]))


def test_padding_and_dilation_without_effect_are_allowed() -> None:
    layer = nn.Conv2d(4, 4, 1, padding_mode="circular", dilation=2)
    net = nn.Sequential(layer, nn.Conv2d(4, 4, 1))
    lightning_peft.inject(net, peft.HRAConfig(target_modules=["0"], r=2))
    assert type(net[0]) is not nn.Conv2d


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Conv1d(3, 3, 3, dilation=2), "dilation=(2,)"),
        (nn.ConvTranspose1d(3, 3, 3), "transposed convolutions"),
    ],
)
def test_saving_names_layers_that_peft_computes_otherwise(layer, said, tmp_path) -> None:
    net = nn.Sequential(layer, nn.Conv1d(3, 3, 1))
    lightning_peft.inject(net, LoraConfig(target_modules=["0", "1"], r=2))
    with pytest.warns(UserWarning, match="cannot read .* to the same output") as caught:
        lightning_peft.save_adapter(net, tmp_path)
    (message,) = [str(w.message) for w in caught if "same output" in str(w.message)]
    assert "\n  - 0 (Conv" in message
    assert "\n  - 1 (" not in message
    assert said in message


def test_saving_is_quiet_where_peft_computes_the_same(tmp_path) -> None:
    net = nn.Sequential(nn.Conv1d(3, 3, 3, padding="same"), nn.Linear(4, 4))
    lightning_peft.inject(net, LoraConfig(target_modules=["0", "1"], r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_peft.save_adapter(net, tmp_path)


def test_a_merge_that_is_another_function_is_refused() -> None:
    net, _ = bases.convolution(2)
    lightning_peft.inject(net, peft.OFTConfig(target_modules=["one"], oft_block_size=4))
    changed(net)
    with refused(net, UnsupportedError, r"merge of one .* output changes by \d+%"):
        lightning_peft.merge(net)


def test_inputs_to_compare_with() -> None:
    assert probe_input(nn.Linear(3, 2)).shape == (4, 3)
    assert probe_input(nn.Conv2d(3, 2, (1, 3), dilation=2)).shape == (2, 3, 4, 8)
    assert probe_input(nn.Embedding(5, 2)).tolist() == [0, 1, 2, 3, 4]
    assert probe_input(nn.LayerNorm(3)) is None
    assert torch.equal(probe_input(nn.Linear(3, 2)), probe_input(nn.Linear(3, 2)))

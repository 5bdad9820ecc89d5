"""Adapters on weights of experts, which transformers keeps as parameters of three dimensions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from expert_models import CONFIGS, model_of
from peft import LoraConfig, PeftModel, get_peft_model

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.adapters import adapted_layers, adapter_file_tensors, adapter_parameters
from lightning_peft.engine.layers.expert_weights import (
    ExpertWeight,
    RoutedExperts,
    parameter_name,
)
from lightning_peft.errors import TargetModulesError, UnsupportedError

from .reference import injected, output_of, randomize, refused, relative_error

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(3, 27).view(2, 12)
WAYS = ("eager", "grouped_mm", "batched_mm")
LONG = pytest.mark.long
# Of weights that are stored transposed and of others.
SHORT_RUNS = [
    ("llama4", "eager"),
    ("qwen3", "grouped_mm"),
    ("gpt-oss", "eager"),
    ("qwen3", "batched_mm"),
]
RUNS = [
    pytest.param(kind, way, marks=() if (kind, way) in SHORT_RUNS else LONG)
    for kind in ("qwen3", "gpt-oss")
    for way in WAYS
] + [pytest.param("llama4", "eager", marks=LONG)]


def trained(kind="qwen3", way="grouped_mm", **settings):
    """Returns a model with adapters that have values, and a copy of its base."""
    model = model_of(kind, way)
    base = copy.deepcopy(model)
    injected(model, **{"r": 4, "target_modules": ["q_proj"], **settings})
    randomize(model)
    return model, base


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("dense layer", "gpt-oss") else LONG) for k in CONFIGS],
)
def test_peft_reads_all_that_is_adapted_by_default(kind, tmp_path):
    model, base = trained(kind, target_modules=None)
    experts = [n for n, x in adapted_layers(model).items() if isinstance(x, ExpertWeight)]
    assert len(experts) == (4 if kind in ("mixtral", "qwen3", "gpt-oss", "llama4") else 2)
    lightning_peft.save_adapter(model, tmp_path)
    expected = output_of(model, {"input_ids": IDS})
    assert relative_error(output_of(base, {"input_ids": IDS}), expected) > 0.01
    fresh = copy.deepcopy(base)
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    assert relative_error(output_of(theirs, {"input_ids": IDS}), expected) < 2e-6
    lightning_peft.load_adapter(fresh, tmp_path)
    assert torch.equal(output_of(fresh, {"input_ids": IDS}), expected)


@pytest.mark.parametrize("named", [None, "all-linear", ["router"]])
def test_a_linear_router_is_adapted_where_it_is_named(named):
    model = injected(model_of("llama4"), r=2, target_modules=named)
    routers = [name for name in adapted_layers(model) if name.endswith(".router")]
    assert len(routers) == (2 if isinstance(named, list) else 0)


@pytest.mark.parametrize(
    "pattern",
    [
        {"rank_pattern": {"experts.gate_up_proj": 2, "down_proj": 3}},
        {"alpha_pattern": {r".*experts\.down_proj": 2}},
    ],
)
def test_patterns_for_experts_are_read_from_folders(pattern, tmp_path):
    model, base = trained(target_parameters=PARAMETERS, **pattern)
    lightning_peft.save_adapter(model, tmp_path)
    expected, fresh = output_of(model, {"input_ids": IDS}), copy.deepcopy(base)
    lightning_peft.load_adapter(fresh, tmp_path)
    assert torch.equal(output_of(fresh, {"input_ids": IDS}), expected)
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    assert relative_error(output_of(theirs, {"input_ids": IDS}), expected) < 2e-6


@pytest.mark.parametrize(("kind", "way"), RUNS)
def test_outputs_and_gradients_are_those_of_peft(kind, way):
    model, base = trained(kind, way, target_parameters=PARAMETERS, rank_pattern={"down_proj": 2})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=PARAMETERS,
        rank_pattern={"down_proj": 2},
    )  # fmt: skip
    reference = get_peft_model(base, config)
    names = list(adapted_layers(model))
    mine = adapter_file_tensors(model, names, "default")
    theirs = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in theirs.items()
    }
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in theirs.items()}
    with torch.no_grad():
        for name, param in theirs.items():
            param.copy_(mine[name])
    for one in (model, reference):
        output_of(one, {"input_ids": IDS}).pow(2).mean().backward()
    for name, param in theirs.items():
        assert param.grad.any()
        assert relative_error(mine[name].grad, param.grad) < 1e-5, name
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_first_values_are_those_of_peft():
    model, base = model_of(), model_of()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": PARAMETERS}
    torch.manual_seed(1)
    injected(model, LoraConfig(**settings))
    torch.manual_seed(1)
    reference = get_peft_model(base, LoraConfig(**settings))
    theirs = [p for n, p in reference.named_parameters() if "lora_A" in n]
    mine = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert sorted(x.sum().item() for x in mine) == sorted(x.sum().item() for x in theirs)


@pytest.mark.parametrize("kind", [pytest.param("dense layer", marks=LONG), "gpt-oss"])
def test_merging_and_unloading(kind):
    model, base = trained(kind, target_modules=None)
    names, expected = list(base.state_dict()), output_of(model, {"input_ids": IDS})
    before = output_of(base, {"input_ids": IDS})
    assert list(dict(base.named_parameters())) == [
        n for n, _ in model.named_parameters() if ".lora_" not in n
    ]
    report = lightning_peft.merge(model)
    assert report.worst_error < 1e-6
    assert relative_error(output_of(model, {"input_ids": IDS}), expected) < 1e-6
    lightning_peft.unmerge(model)
    assert relative_error(output_of(model, {"input_ids": IDS}), expected) < 1e-6
    with lightning_peft.disable_adapters(model):
        assert relative_error(output_of(model, {"input_ids": IDS}), before) < 1e-6
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    assert list(model.state_dict()) == names
    assert not any(isinstance(x, (ExpertWeight, RoutedExperts)) for x in model.modules())
    assert [type(x) for x in model.modules()] == [type(x) for x in base.modules()]
    assert relative_error(output_of(model, {"input_ids": IDS}), expected) < 1e-6


def test_copies_and_pickles_compute_alone():
    model, _ = trained(target_parameters=PARAMETERS)
    expected = output_of(model, {"input_ids": IDS})
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(other, {"input_ids": IDS}), expected)
        (layer, *_) = (x for x in other.modules() if isinstance(x, ExpertWeight))
        assert layer.owner in set(other.modules())
        assert layer.weight.stored is layer.owner._parameters[layer.parameter_name]
    assert model.get_parameter("model.layers.0.mlp.experts.down_proj").requires_grad is False


def test_verification_and_checkpoints_hold_the_adapters():
    model, base = trained(target_parameters=PARAMETERS)
    state = engine.trainable_state_dict(model)
    assert state.keys() == adapter_parameters(model).keys()
    described = engine.describe(model)
    engine.inject_as_described(base, described)
    engine.load_trainable_state_dict(base, state)
    expected = output_of(model, {"input_ids": IDS})
    assert torch.equal(output_of(base, {"input_ids": IDS}), expected)
    result = engine.verify(model, {"input_ids": IDS, "labels": IDS})
    assert result.passed, str(result)


def test_checkpoints_from_before_have_no_adapters_on_experts():
    model, base = trained(target_parameters=[], target_modules=None)
    described = engine.describe(model)
    for part in described["parts"].values():
        part["adapters"]["default"]["config"]["target_parameters"] = None
    engine.inject_as_described(base, described)
    assert adapted_layers(base).keys() == adapted_layers(model).keys()
    assert not any(isinstance(x, RoutedExperts) for x in base.modules())


def test_experts_that_rows_do_not_reach_get_no_gradient():
    model, _ = trained("qwen3", "eager", target_parameters=["down_proj"], r=2)
    output_of(model, {"input_ids": IDS[:1, :1]}).sum().backward()
    layer = model.model.layers[0].mlp.experts.down_proj_per_expert
    reached = layer.lora_A["default"].weight.grad.view(4, 2, -1).flatten(1).any(1)
    assert reached.sum() == 2


def test_no_weight_of_all_experts_is_made(monkeypatch):
    model, _ = trained("mixtral", target_parameters=PARAMETERS)

    def refuse(*_):
        raise AssertionError("a weight with the adapter in it")

    layers = [x for x in model.modules() if isinstance(x, ExpertWeight)]
    for layer in layers:
        monkeypatch.setattr(type(layer), "effective_weight", refuse)
        monkeypatch.setattr(type(layer), "effective_expert", refuse)
    for way in WAYS:
        model.set_experts_implementation(way)
        output_of(model, {"input_ids": IDS}).sum().backward()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lora_dropout": 0.1}, r"gate_up_proj_per_expert: lora_dropout=0.1: PEFT has no dropout"),
        ({"use_dora": True}, "weights of experts are adapted in place only"),
        ({"init_lora_weights": "pissa"}, "'pissa' is for linear layers, not a ExpertWeight"),
    ],
)
def test_what_does_not_work_on_experts_is_refused_where_they_are_named(settings, match):
    model = model_of()
    with refused(model, UnsupportedError, match):
        lightning_peft.inject(model, r=2, target_parameters=PARAMETERS, **settings)
    left = injected(model, r=2, **settings)
    assert not any(isinstance(x, RoutedExperts) for x in left.modules())


@pytest.mark.parametrize("entry", ["experts", "mlp.experts", r".*\.experts"])
def test_experts_are_left_out_by_name(entry):
    excluded = entry if "*" in entry else [entry]
    model = injected(model_of(), r=2, exclude_modules=excluded)
    assert {n.rpartition(".")[2] for n in adapted_layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert not any(isinstance(x, RoutedExperts) for x in model.modules())


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({"exclude_modules": ["self_attn"]}, "model.layers.0.self_attn.q_proj"),
        (
            {"exclude_modules": ["mlp.experts"], "target_parameters": PARAMETERS},
            "model.layers.0.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_exclusions_that_leave_out_nothing_are_named(settings, layer, caplog):
    model = injected(model_of(), r=2, **settings)
    assert layer in {parameter_name(name) for name in adapted_layers(model)}
    (entry,) = settings["exclude_modules"]
    assert f"exclude_modules={entry!r} leaves out no layer" in caplog.text
    assert f"keeps its adapters, here {layer}. Name the layers" in caplog.text


def test_names_that_match_no_weight_are_refused():
    model = model_of()
    match = "'experts.up_proj' of target_parameters matches no weight.*near names: .*gate_up_proj"
    with refused(model, TargetModulesError, match):
        lightning_peft.inject(model, target_parameters=["experts.up_proj"])
    match = (
        r"'down_proj' of target_modules matches nothing.*\n.*weights of experts are named by "
        r"target_parameters=\['experts.down_proj'\]"
    )
    with refused(model, TargetModulesError, match):
        lightning_peft.inject(model, target_modules=["q_proj", "down_proj"])


def test_models_that_peft_wrapped_at_parameters_are_refused_by_that_name():
    config = LoraConfig(target_modules=[], target_parameters=PARAMETERS)
    match = r"target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\] put them on param"
    with pytest.raises(UnsupportedError, match=match):
        lightning_peft.inject(get_peft_model(model_of(), config))


def test_ways_of_running_that_read_whole_weights_are_refused():
    model = model_of(way="eager")
    model.config._experts_implementation = "sonicmoe"
    with refused(model, UnsupportedError, "experts_implementation='sonicmoe' passes whole weights"):
        lightning_peft.inject(model, r=2, target_parameters=PARAMETERS)
    model.config._experts_implementation = "eager"
    injected(model, r=2)
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedError, match="Experts with adapters or quantized weights"):
        model(IDS)


def test_weights_of_layers_may_be_named_as_parameters():
    model = injected(
        model_of(), LoraConfig(target_modules=[], target_parameters=["0.self_attn.q_proj.weight"])
    )
    assert list(adapted_layers(model)) == ["model.layers.0.self_attn.q_proj"]

"""Names become an exact list of layers, or an error that lists every wrong one."""

from __future__ import annotations

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

import lightning_peft
from lightning_peft.arguments import LoRAFields
from lightning_peft.engine.configuration import lora_config
from lightning_peft.engine.selection.targets import (
    resolve_saved_modules,
    resolve_targets,
    shortest_suffixes,
    similar_layer_names,
)
from lightning_peft.errors import TargetModulesError

from .reference import injected


def targets_of(part: nn.Module, **settings) -> list[str]:
    return resolve_targets({"": part}, lora_config(LoRAFields(**settings)))[""]


PEFT_CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(q|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.0.self_attn.v_proj"]},
]


@pytest.mark.parametrize("settings", PEFT_CASES, ids=str)
def test_the_rule_is_that_of_peft(settings: dict) -> None:
    found = targets_of(tiny_llama(), **settings)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(**settings))
    assert sorted(found) == sorted(wrapped.base_model.targeted_module_names)


def test_layers_to_transform_works_with_all_linear() -> None:
    every = targets_of(tiny_llama())
    found = targets_of(tiny_llama(), layers_to_transform=[1])
    assert found == [name for name in every if ".layers.1." in name]
    assert len(found) == 7


def test_exclude_modules_works_with_all_linear() -> None:
    found = targets_of(tiny_llama(), exclude_modules=["down_proj", "q_proj"])
    assert len(found) == 10
    assert not any(name.endswith(("down_proj", "q_proj")) for name in found)


def test_all_linear_leaves_out_heads_and_output_embeddings() -> None:
    assert targets_of(stack()) == ["first", "second"]
    assert len(targets_of(tiny_llama())) == 14
    assert "lm_head" not in targets_of(tiny_gpt2())
    assert len(targets_of(tiny_gpt2())) == 8
    assert targets_of(stack(), target_modules=["head"]) == ["head"]


def test_unmatched_names_are_listed_together_with_near_ones() -> None:
    with pytest.raises(TargetModulesError) as caught:
        targets_of(
            tiny_llama(),
            target_modules=["q_prj", "v_proj", "attention"],
            exclude_modules=["donw_proj"],
            rank_pattern={"up_pro": 4},
            alpha_pattern={"o_proj": 4},
        )
    message = str(caught.value)
    assert "'q_prj' of target_modules matches nothing; near names: q_proj" in message
    assert "'attention' of target_modules matches nothing" in message
    assert "'donw_proj' of exclude_modules matches nothing; near names: down_proj" in message
    assert "'up_pro' of rank_pattern matches no adapted layer" in message
    # Matches a layer, but not an adapted one: PEFT ignores it.
    assert "'o_proj' of alpha_pattern matches no adapted layer" in message
    assert "'v_proj'" not in message


def test_an_expression_that_matches_nothing() -> None:
    with pytest.raises(TargetModulesError, match=r"target_modules='\.\*query' matches nothing"):
        targets_of(tiny_llama(), target_modules=".*query")


class Linear(nn.Module):
    """As torch_geometric has one, which is not torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))


def test_the_error_without_targets_lists_the_layer_types() -> None:
    with pytest.raises(TargetModulesError, match=r"kinds \S*test_targets\.Linear\."):
        targets_of(nn.Sequential(Linear()))
    with pytest.raises(TargetModulesError, match="nothing to adapt in Sequential.*Conv2d"):
        targets_of(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(TargetModulesError, match="nothing to adapt in Stack"):
        targets_of(stack(), target_modules=["first"], exclude_modules=["first"])


class SameName(nn.Module):
    """A linear layer called ``encoder`` inside a container called ``encoder``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"encoder": nn.Linear(4, 4)}))
        self.head = nn.Linear(4, 2)


def test_a_container_of_the_same_name_is_not_a_target() -> None:
    assert targets_of(SameName(), target_modules=["encoder"]) == ["encoder.1.encoder"]
    model = injected(SameName(), r=2, target_modules=["encoder"])
    assert "lora_A" in model.encoder[1]["encoder"]._modules
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(SameName(), LoraConfig(target_modules=["encoder"]))


def test_with_several_parts_a_name_has_to_match_in_one() -> None:
    parts = {"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "b": nn.ModuleDict({"y": nn.Linear(2, 2)})}
    found = resolve_targets(parts, lora_config(LoRAFields(target_modules=["x", "y"])))
    assert found == {"a": ["x"], "b": ["y"]}
    with pytest.raises(TargetModulesError, match="nothing to adapt in b"):
        resolve_targets(parts, lora_config(LoRAFields(target_modules=["x"])))
    with pytest.raises(TargetModulesError, match="'z' of target_modules"):
        resolve_targets(parts, lora_config(LoRAFields(target_modules=["x", "y", "z"])))


def test_a_second_adapter_does_not_adapt_the_first() -> None:
    model = injected(stack(), r=2, adapter_name="a")
    assert targets_of(model) == ["first", "second"]


def test_saved_modules_by_the_end_of_names_outermost_only() -> None:
    model = tiny_llama()
    nothing: dict[str, list[str]] = {"": []}
    found = resolve_saved_modules({"": model}, ["lm_head", "mlp", "up_proj"], nothing)[""]
    assert found == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]
    norms = resolve_saved_modules({"": model}, ["norm"], nothing)[""]
    assert norms == [name for name, _ in model.named_modules() if name.endswith("norm")]
    assert len(norms) == 5
    others = resolve_saved_modules({"": model}, ["proj", "head"], {"": targets_of(model)})[""]
    assert others == ["lm_head"]
    with pytest.raises(
        TargetModulesError, match="'lm_hed' of modules_to_save.*near names: lm_head"
    ):
        resolve_saved_modules({"": model}, ["lm_hed", "mlp"], nothing)
    assert resolve_saved_modules({"": model}, [], nothing) == {"": []}


def test_compact_names_mean_exactly_the_targets() -> None:
    model = tiny_llama()
    for settings in PEFT_CASES:
        targets = targets_of(model, **settings)
        short = shortest_suffixes(targets, model)
        assert targets_of(model, target_modules=short) == targets
    assert shortest_suffixes(targets_of(model, target_modules=["q_proj"]), model) == ["q_proj"]
    assert shortest_suffixes(["encoder.1.encoder"], SameName()) == ["1.encoder"]
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert shortest_suffixes(["0"], inner) == "0"
    assert targets_of(inner, target_modules="0") == ["0"]
    assert targets_of(inner, target_modules=["0"]) == ["0", "1.0"]


def test_similar_layer_names() -> None:
    assert similar_layer_names("x.q_prj", ["a.q_proj", "b.q_proj"]) == "; near names: q_proj"
    assert similar_layer_names("zzz", ["a.b", "a.c"]) == "; there are: b, c"
    assert similar_layer_names("zzz", []) == ""


def test_parametrized_layers_are_adapted_through_peft() -> None:
    """A weight that is computed from others has no parameter of its own to extend."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    torch.nn.utils.parametrizations.weight_norm(model["layer"])
    x = torch.randn(3, 4)
    before = model["layer"](x)
    report = lightning_peft.inject(model, r=2, target_modules=["layer"])
    assert not report.parts[0].in_place
    assert torch.equal(model["layer"](x), before)

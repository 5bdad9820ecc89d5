"""What is asked for by name, what errors say of what is left, and that it stays so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.selection.parts import find_heads
from lightning_peft.engine.selection.scope import is_frozen, select
from lightning_peft.engine.training.activation_checkpointing import checkpoint_activations
from lightning_peft.errors import LightningPeftError, TargetModulesError

from .reference import injected

FROZEN = "frozen by the module"


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


class Distiller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = mlp(8, 16, 16)
        self.teacher = mlp(8, 32, 16, 4).eval().requires_grad_(False)
        self.teacher.append(nn.Embedding(4, 4).requires_grad_(False))
        self.head = nn.Linear(16, 4)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, True),
        ("all-linear", True),
        (["0", "1"], True),
        (r".*\.[01]", True),
        (["0", "teacher.0"], False),
        (["0", "2"], False),
        (r"(student|teacher)\.0", False),
        (r"\w+\.2", False),
    ],
)
def test_target_modules_name_a_frozen_part_or_do_not(wanted, left) -> None:
    module = Distiller()
    report = lightning_peft.inject(module, r=2, target_modules=wanted)
    adapted = engine.adapted_layers(module)
    assert report.left == ({"teacher": FROZEN} if left else {})
    assert any(name.startswith("teacher") for name in adapted) is not left
    assert module.teacher.training is False


def test_an_entry_that_matches_in_a_metric_only_is_refused_with_the_reason() -> None:
    class Exact(nn.Module):
        __module__ = "torchmetrics.tests"

        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Linear(4, 4)

    module = nn.ModuleDict({"trunk": mlp(4, 4, 4), "head": nn.Linear(4, 2), "exact": Exact()})
    with pytest.raises(TargetModulesError, match="'probe' of target_modules matches nothing") as e:
        lightning_peft.inject(module, r=2, target_modules=["0", "probe"])
    e.match(r"Nothing is looked for in exact: metrics, .*\. Name them in `adapt` if they are meant")
    assert engine.record_of(module) is None
    report = lightning_peft.inject(module, r=2, adapt="exact", target_modules=["probe"])
    assert report.left == {}
    assert engine.adapted_layers(module).keys() == {"exact.probe"}


def test_the_error_without_targets_names_skipped_modules() -> None:
    module = nn.ModuleDict({"teacher": mlp(8, 8, 4).requires_grad_(False), "head": mlp(8, 4)})
    with pytest.raises(TargetModulesError, match="Nothing is looked for in teacher: "):
        lightning_peft.inject(module, r=2)


def test_exclude_and_save_may_name_skipped_modules() -> None:
    module = Distiller()
    settings = {"exclude_modules": r"teacher\..*", "modules_to_save": ["1"]}
    report = lightning_peft.inject(module, r=2, **settings)
    assert report.parts[0].saved == ["student.1"]
    assert report.left == {"teacher": FROZEN}
    assert not any(p.requires_grad for p in module.teacher.parameters())
    only = Distiller()
    assert lightning_peft.inject(only, r=2, modules_to_save=["3"]).parts[0].saved == ["teacher.3"]
    assert [n for n, p in only.teacher.named_parameters() if p.requires_grad] == ["3.weight"]


@pytest.mark.parametrize("biases", ["all", "lora_only"])
def test_biases_of_skipped_modules_do_not_train(biases) -> None:
    module = injected(Distiller(), r=2, bias=biases)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert engine.require_record(module).parts[""].initial_values.keys() == {
        "student.0.bias",
        "student.1.bias",
    } | ({"head.bias"} if biases == "all" else set())


def test_skipped_modules_are_in_the_state_and_not_in_the_base() -> None:
    module = injected(Distiller(), r=2)
    record = engine.require_record(module)
    assert record.parts[""].base.names == (
        "student.0.weight",
        "student.0.bias",
        "student.1.weight",
        "student.1.bias",
    )
    assert "teacher.0.weight" in engine.trainable_state_dict(module)
    assert "student.0.weight" not in engine.trainable_state_dict(module)


def test_a_second_adapter_goes_where_the_first_one_is() -> None:
    module = injected(Distiller(), r=2)
    first = set(engine.adapted_layers(module))
    module.teacher.requires_grad_(True)
    lightning_peft.inject(module, r=2, adapter_name="second")
    assert set(engine.adapted_layers(module)) == first == {"student.0", "student.1"}
    assert lightning_peft.report(module).left == {"teacher": FROZEN}
    assert all(p.requires_grad for p in module.teacher.parameters())


def test_a_description_lists_skipped_modules() -> None:
    module, same, older = Distiller(), Distiller(), Distiller()
    same.load_state_dict(module.state_dict())
    lightning_peft.inject(module, r=2)
    described = engine.describe(module)
    same.teacher.requires_grad_(True)
    engine.inject_as_described(same, described)
    assert set(engine.adapted_layers(same)) == {"student.0", "student.1"}
    # What files of older versions describe: everything was adapted.
    older.teacher.requires_grad_(True)
    lightning_peft.inject(older, r=2)
    described = engine.describe(older)
    assert described.pop("left") == {}
    again = Distiller()
    again.load_state_dict({k: v for k, v in older.state_dict().items() if "lora" not in k})
    engine.inject_as_described(again, described)
    assert set(engine.adapted_layers(again)) == set(engine.adapted_layers(older))
    assert "teacher.0" in engine.adapted_layers(again)


def test_a_description_that_does_not_fit_leaves_no_record() -> None:
    module = injected(Distiller(), r=2, target_modules=["0"])
    described = engine.describe(module)
    other = nn.ModuleDict({"words": nn.Embedding(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(LightningPeftError, match="cannot be put on ModuleDict"):
        engine.inject_as_described(other, described)
    assert engine.record_of(other) is None


def test_packed_weights_do_not_count_as_frozen() -> None:
    layer = nn.Linear(4, 4)
    assert not is_frozen(layer)
    assert is_frozen(layer.requires_grad_(False))
    codes = nn.Module()
    codes.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert not is_frozen(codes)
    assert not is_frozen(nn.ReLU())


def test_both_classifiers_of_timm_are_heads() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head, self.head_dist = mlp(4, 4), mlp(4, 2), mlp(4, 2)

        def get_classifier(self) -> tuple[nn.Module, nn.Module]:
            return self.head, self.head_dist

    assert list(find_heads(Two())) == ["head", "head_dist"]


def test_the_report_lists_skipped_modules_with_reasons() -> None:
    text = str(lightning_peft.inject(Distiller(), r=2))
    assert "left alone" in text
    assert "teacher (frozen by the module)" in text


def test_skipped_modules_are_not_checkpointed() -> None:
    module = nn.ModuleDict({
        "generator": nn.ModuleList([mlp(8, 8), mlp(8, 8)]),
        "lpips": nn.ModuleList([mlp(8, 8), mlp(8, 8)]),
        "head": nn.Linear(8, 2),
    })  # fmt: skip
    lightning_peft.inject(module, r=2)
    done = checkpoint_activations(module, True)
    assert done.blocks == list(module["generator"])
    done.disable()


def test_selection_changes_nothing() -> None:
    module = Distiller()
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    chosen = select(module)
    assert (list(chosen.parts), chosen.left) == ([""], {"teacher": FROZEN})
    assert {name: p.requires_grad for name, p in module.named_parameters()} == before

"""What of a module is adapted, what is left as it is, and in which mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.registry import is_quantized

from .shapes import SHAPES, Shape

SETTINGS = {"lora": None, "qlora": engine.quantization_config()}


def inside(name: str, roots: Any) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def seen(child: nn.Module) -> tuple[Any, ...]:
    """Everything of one module, without those below it, that must not change."""
    params = list(child.parameters(recurse=False))
    values = [value.clone() for value in (*params, *child.buffers(recurse=False))]
    return type(child), child.training, [p.requires_grad for p in params], values


def own(module: nn.Module, shape: Shape) -> dict[str, nn.Module]:
    """Returns the submodules that only what is left holds."""
    named = list(module.named_modules(remove_duplicate=False))
    # By id: metrics compare their values.
    others = {id(child) for name, child in named if not inside(name, shape.left)}
    return {name: child for name, child in named if id(child) not in others}


CASES = [
    pytest.param(
        shape,
        method,
        id=f"{shape.name}-{method}",
        # The others differ from one of these in a detail that quantization does not depend on.
        marks=[pytest.mark.long] if method == "qlora" and not shape.title else [],
    )
    for shape in SHAPES
    for method in SETTINGS
]


def test_there_are_shapes_enough_and_none_twice() -> None:
    assert len({shape.name for shape in SHAPES}) == len(SHAPES) >= 40


@pytest.mark.parametrize(("shape", "method"), CASES)
def test_what_is_adapted_left_and_trained(shape: Shape, method: str) -> None:
    torch.manual_seed(0)
    module = shape.module()
    before = {name: seen(child) for name, child in own(module, shape).items()}
    report = lightning_peft.inject(module, r=2, quantization_config=SETTINGS[method], **shape.given)
    engine.set_training_mode(module)
    assert report.left == shape.left
    layers = engine.adapted_layers(module)
    adapted = {id(layer) for layer in layers.values()}
    names = {n for n, x in module.named_modules(remove_duplicate=False) if id(x) in adapted}
    assert {name for name in names if not inside(name, [*shape.adapted, *shape.left])} == set()
    assert {root for root in shape.adapted if not any(inside(n, [root]) for n in names)} == set()
    assert [name for name, child in own(module, shape).items() if id(child) in adapted] == []
    if method == "qlora":
        quantized = {name for name, child in module.named_modules() if is_quantized(child)}
        assert quantized >= layers.keys()
    # What trains: adapters, besides those that follow, and what is named.
    adapters = engine.adapter_parameters(module)
    follow = {name for name in adapters if inside(name, shape.follows)}
    assert {n for n, p in adapters.items() if p.requires_grad} == adapters.keys() - follow
    trained = {n for n, p in module.named_parameters() if p.requires_grad} - adapters.keys()
    assert {name for name in trained if not inside(name, shape.trains)} == set()
    assert {root for root in shape.trains if not any(inside(n, [root]) for n in trained)} == set()
    dropouts = {id(child) for layer in layers.values() for child in layer.lora_dropout.modules()}
    resting = {n for n, x in module.named_modules() if not x.training and id(x) not in dropouts}
    assert {name for name in resting if not inside(name, shape.eval)} == set()
    assert set(shape.eval) <= resting
    idle = {layer for name, layer in layers.items() if inside(name, shape.follows)}
    assert all(x.lora_dropout.training is (x not in idle or x.training) for x in layers.values())
    for name, child in own(module, shape).items():
        (*then, old), (*now, new) = before[name], seen(child)
        assert now == then
        assert [a.equal(b) for a, b in zip(old, new, strict=True)] == [True] * len(old)

"""What tests of the engine have in common: PEFT's own model, adapted models, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from models import stack, tiny_llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.streamed_merging import StreamedMerge


def injected(model: Any, *config: Any, **settings: Any) -> Any:
    """Returns ``model`` with adapters."""
    lightning_peft.inject(model, *config, **settings)
    return model


def adapted(build: Callable[[], nn.Module] = stack, **settings: Any) -> Any:
    """Returns a model with adapters that have random values, as after training."""
    model = injected(build(), **{"r": 4, **settings})
    randomize(model)
    return model


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Returns everything of a module that injecting, loading or merging could change."""
    record = engine.record_of(module)
    kept = ("base", "loaded", "heads", "saved", "replaced", "changed_base")
    parts = {} if record is None else record.parts
    return {
        "classes": [(name, type(child)) for name, child in module.named_modules()],
        "modes": [child.training for child in module.modules()],
        "attributes": [sorted(vars(child)) for child in module.modules()],
        "gradients": [(name, p.requires_grad, id(p)) for name, p in module.named_parameters()],
        "values": {n: v if v.is_meta else v.clone() for n, v in module.state_dict().items()},
        "hooks": [len(child._forward_hooks) for child in module.modules()],
        "merged": [[*getattr(child, "merged_adapters", ())] for child in module.modules()],
        "record": [
            (name, sorted(part.frozen), list(part.adapters), list(part.initial_values))
            + tuple(copy.copy(getattr(part, field)) for field in kept)
            for name, part in parts.items()
        ],
        "active": None if record is None else record.active,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Asserts that two snapshots are equal, values bit for bit."""
    values, now = before.pop("values"), after.pop("values")
    assert list(values) == list(now)
    for name, value in values.items():
        same = value.is_meta or torch.equal(value, now[name])
        # Values that are not numbers equal nothing.
        assert same or (value != value).equal(now[name] != now[name]), name
    assert before == after


@contextmanager
def refused(module: nn.Module, error: type[BaseException], match: str) -> Iterator[Any]:
    """Asserts that the body raises, and leaves the module exactly as it was."""
    before = snapshot(module)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert_same(before, snapshot(module))


def peft_model(base: nn.Module, config: PeftConfig) -> Any:
    """Returns PEFT's model around a copy of ``base``."""
    return get_peft_model(copy.deepcopy(base), copy.deepcopy(config))


def without_repacking(model: nn.Module) -> nn.Module:
    """Turns off bitsandbytes' own CPU repacking, which a reference must not meet either."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def randomize(module: nn.Module, scale: float = 0.1) -> dict[str, Tensor]:
    """Gives every adapter tensor of ``module`` new values, as training would, and returns them."""
    values = {}
    for name, param in adapter_parameters(module).items():
        param.copy_(torch.randn_like(param) * scale)
        values[name] = param.detach().clone()
    return values


@torch.no_grad()
def copy_adapter(module: nn.Module, reference: PeftModel, prefix: str = "base_model.model.") -> int:
    """Copies all adapter values of ``module`` into PEFT's model; returns how many tensors."""
    # PEFT keeps the projection behind an attention in its wrapper of that.
    theirs = {
        name
        if name.endswith(("base_layer.weight", "base_layer.bias"))
        else name.replace(".base_layer.", "."): param
        for name, param in reference.named_parameters()
    }
    mine = adapter_parameters(module)
    for name, param in mine.items():
        theirs[f"{prefix}{name}"].copy_(param)
    return len(mine)


def output_of(model: Any, batch: Any) -> Tensor:
    """Returns logits of a transformers model, or the output of another one."""
    result = model(**batch) if isinstance(batch, dict) else model(batch)
    return result if isinstance(result, Tensor) else result.logits


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Returns ``||value - expected|| / ||expected||``, in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm()).item()


def dequantized_by_torch(codes: Tensor, state: Any) -> Tensor:
    """Returns the weights of 4-bit codes: blocks are counted over all of them, not by row."""
    octets = codes.view(-1)
    places = torch.stack([octets >> 4, octets & 15], 1).view(-1)[: state.shape.numel()]
    constants = state.absmax
    if state.nested:
        outer = state.state2
        factors = outer.absmax.repeat_interleave(outer.blocksize)[: len(constants)]
        constants = outer.code[constants.long()] * factors + state.offset
    scales = constants.repeat_interleave(state.blocksize)[: len(places)]
    return (state.code[places.long()] * scales).view(state.shape)


def merged_by_weight(model: Any, folder: Path) -> tuple[dict[str, Tensor], StreamedMerge]:
    """Merges a tiny Llama's adapters into it, and from a folder into the weights one by one.

    Returns the latter, and what made them.
    """
    lightning_peft.save_adapter(model, folder)
    torch.manual_seed(0)
    plain = tiny_llama()
    with torch.device("meta"):
        outline = tiny_llama()
    merge = StreamedMerge(outline, folder, dtype=torch.float32)
    merged = {name: merge.merged(name, value) for name, value in plain.state_dict().items()}
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    return merged, merge

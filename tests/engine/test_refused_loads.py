"""A folder that is refused leaves the module exactly as it was."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import stack, tiny_llama
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.rollback import restored_on_error
from lightning_peft.errors import BaseMismatchError, CheckpointError, LightningPeftError

from .reference import adapted, injected, randomize, refused


def mixed() -> nn.Module:
    torch.manual_seed(0)
    module = tiny_llama()
    module.lm_head.requires_grad_(False)
    module.model.layers[0].eval()
    module.train(False)
    module.model.layers[1].train()
    module.model.norm.register_forward_hook(lambda *args: None)
    return module


def drop_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])


def one_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.elsewhere.weight": torch.ones(2)}


def another_shape(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(iter(tensors))
    return {**tensors, key: tensors[key][:1].contiguous()}


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "missing": drop_one,
    "unexpected": one_more,
    "shape": another_shape,
}
METHODS: dict[str, dict[str, Any]] = {
    "in place": {"r": 2},
    "wrapped": {"peft_config": LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"])},
    "saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "rewritten base": {"r": 2, "init_lora_weights": "pissa"},
    "biases": {"r": 2, "bias": "all"},
}


def folder_of(path: Path, settings: dict[str, Any], change: str) -> Path:
    module = injected(mixed(), **settings)
    randomize(module)
    folder = lightning_peft.save_adapter(module, path)
    file = folder / "adapter_model.safetensors"
    save_file(CHANGES[change](load_file(file)), file)
    (folder / "provenance.json").unlink()
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    # Folders of PEFT keep an initialisation that rewrites the base.
    init = settings.get("init_lora_weights", True)
    config.write_text(json.dumps({**fields, "init_lora_weights": init}))
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_refused_folder_stays(method: str, change: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, METHODS[method], change)
    module = mixed()
    with refused(module, CheckpointError, "does not fit"):
        lightning_peft.load_adapter(module, folder)
    lightning_peft.inject(module, r=2)


def test_nothing_stays_where_the_base_is_quantized_on_the_way(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"r": 2}, "missing")
    module = mixed()
    with refused(module, CheckpointError, "missing"):
        lightning_peft.load_adapter(
            module, folder, quantization_config=engine.quantization_config()
        )


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_adapter_stays_when_a_second_is_refused(change: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"r": 2}, change)
    module = injected(mixed(), r=4, adapter_name="first")
    randomize(module)
    with refused(module, CheckpointError, "does not fit"):
        lightning_peft.load_adapter(module, folder, adapter_name="second")
    assert engine.require_record(module).active == ("first",)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """As after a step that diverged: PEFT loads them, and the model answers with anything."""
    folder = lightning_peft.save_adapter(injected(mixed(), r=2), tmp_path)
    (folder / "provenance.json").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key] * torch.inf}, file)
    module = mixed()
    with refused(module, CheckpointError, rf"NaN or infinite values(.|\n)*{re.escape(key)}"):
        lightning_peft.load_adapter(module, folder)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_heads_may_be_infinite_on_purpose(value: float, tmp_path: Path) -> None:
    """As masks and forbidden transitions are, which a folder holds next to its factors."""
    folder = lightning_peft.save_adapter(injected(mixed(), r=2, modules_to_save=["norm"]), tmp_path)
    (folder / "provenance.json").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.norm.weight"][0] = value
    save_file(tensors, file)
    module = mixed()
    if value == value:
        lightning_peft.load_adapter(module, folder)
        assert module.model.norm.weight[0] == value
    else:
        with refused(module, CheckpointError, "NaN or infinite values"):
            lightning_peft.load_adapter(module, folder)


def test_another_base_leaves_nothing(tmp_path: Path) -> None:
    lightning_peft.save_adapter(adapted(), tmp_path)
    other = stack()
    with refused(other, BaseMismatchError, "was trained on another base"):
        lightning_peft.load_adapter(other, tmp_path)


def test_one_of_several_parts_that_does_not_fit_refuses_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = nn.ModuleDict({"one": tiny_llama(), "two": tiny_llama()})
    module = injected(copy.deepcopy(pair), r=2)
    randomize(module)
    lightning_peft.save_adapter(module, tmp_path)
    file = tmp_path / "two" / "adapter_model.safetensors"
    save_file(drop_one(load_file(file)), file)
    (tmp_path / "two" / "provenance.json").unlink()
    with refused(pair, CheckpointError, "missing"):
        lightning_peft.load_adapter(pair, tmp_path)
    adapted = injected(copy.deepcopy(pair), r=2)
    with refused(adapted, CheckpointError, "missing"):
        lightning_peft.load_adapter(adapted, tmp_path)


def test_what_the_body_did_is_undone_in_the_same_containers() -> None:
    module = stack()
    removed = module.first.register_forward_hook(lambda *args: None)
    module.notes, weight = ["kept"], module.first.weight
    # A container that refuses changes, as modules keep of a pass.
    module.last = output = BaseModelOutput(torch.ones(1))

    def change() -> None:
        with restored_on_error([module], [weight]):
            later = module.first.register_forward_hook(lambda *args: None)
            assert later.id in module.first._forward_hooks
            module.first.weight.data.mul_(2)
            module.first.weight.data = torch.ones(2, 2)
            module.first.bias = None
            module.second = nn.Identity()
            module.notes.append("lost")
            module.extra = nn.Linear(1, 1)
            weight.requires_grad_(False)
            raise KeyboardInterrupt

    with refused(module, KeyboardInterrupt, ""):
        change()
    assert module.notes == ["kept"]
    assert module.last is output
    assert list(output) == ["last_hidden_state"]
    removed.remove()
    assert not module.first._forward_hooks


def test_a_folder_that_is_not_there_names_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing of that name(.|\n)*snapshot_download"):
        lightning_peft.load_adapter(stack(), tmp_path / "someone" / "adapter")
    file = tmp_path / "file"
    file.write_text("{}")
    with pytest.raises(LightningPeftError, match="it is a file, not a folder"):
        lightning_peft.load_adapter(stack(), file)

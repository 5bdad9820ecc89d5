"""What an adapter may be called."""

from __future__ import annotations

import copy

import pytest
import torch
from models import stack
from peft import HRAConfig

import lightning_peft
from lightning_peft.errors import ConfigError

from .reference import injected, randomize, relative_error

REFUSED = {
    "": "is empty",
    " x": "begins or ends with a space",
    "v1.2": r"has '\.' in it",
    "a/b": "has '/' in it",
    "a\\b": "in it",
    "a\nb": "in it",
    "keys": "is an attribute of nn.ModuleDict",
    "training": "is an attribute of nn.ModuleDict",
    "base_layer": "PEFT calls something else",
    "weight": "PEFT calls something else",
    "my_lora_A": "PEFT calls something else",
    "modules_to_save": "PEFT calls something else",
    3: "is of type int, not a string",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_mean_something_else_are_refused(name, tmp_path) -> None:
    saved = injected(stack(), r=2)
    lightning_peft.save_adapter(saved, tmp_path)
    model = stack()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=f"adapter_name=.*{REFUSED[name]}"):
        lightning_peft.inject(model, r=2, adapter_name=name)
    with pytest.raises(ConfigError, match=f"adapter_name=.*{REFUSED[name]}"):
        lightning_peft.load_adapter(model, tmp_path, adapter_name=name)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", ["a", "first", "lora", "0", "default_0", "Grüße", "my adapter-2"])
@pytest.mark.parametrize("method", ["lora", "hra"])
def test_files_of_oddly_named_adapters_load_under_any_name(name, method, tmp_path) -> None:
    base, x = stack(), torch.randn(3, 96)
    saved, loaded = copy.deepcopy(base), copy.deepcopy(base)
    config = HRAConfig(r=2, target_modules=["first"]) if method == "hra" else None
    lightning_peft.inject(
        saved, config, adapter_name=name, **({} if config else {"r": 2, "target_modules": "first"})
    )
    randomize(saved)
    lightning_peft.save_adapter(saved, tmp_path)
    lightning_peft.load_adapter(loaded, tmp_path, adapter_name=name)
    assert relative_error(loaded(x), saved(x)) < 1e-6
    assert relative_error(loaded(x), base(x)) > 1e-4

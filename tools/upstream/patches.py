"""What the tests of other projects are run under: a Trainer or PEFT's functions with adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_peft import LoRAStrategy, QLoRAStrategy, engine
from lightning_peft.errors import TargetModulesError

# The modules that got adapters in the test that runs.
INJECTED: list[str] = []


def seed_layers() -> None:
    """Gives linear layers of one shape the same values in every test, stock and with adapters.

    Tests resume with a fresh module, whose base would be another one than the checkpoint's.
    """
    original = nn.Linear.reset_parameters

    def reset_parameters(self: nn.Linear) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.out_features + self.in_features)
            original(self)

    nn.Linear.reset_parameters = reset_parameters  # type: ignore[method-assign]


def _count_injections() -> None:
    original = engine.inject_config

    def inject_config(module: Any, request: Any, *args: Any) -> Any:
        INJECTED.append(type(module).__name__)
        try:
            return original(module, request, *args)
        except TargetModulesError as error:
            if "nothing to adapt" not in str(error):
                raise
        # Most tests train a single linear layer, a head. As the error advises, it is named.
        names = [name for name, one in module.named_modules() if isinstance(one, nn.Linear)]
        # In place: the next stage compares with what was asked for.
        request.config.target_modules = set(names)
        return original(module, replace(request), *args)

    engine.inject_config = inject_config


def use_strategy(make: Callable[..., Any]) -> None:
    """Gives each Trainer that names no strategy the one that ``make`` returns."""
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    _count_injections()
    original = _AcceleratorConnector.__init__

    @functools.wraps(original)
    def connect(self: Any, *args: Any, strategy: Any = "auto", **kwargs: Any) -> None:
        if isinstance(strategy, str) and strategy == "auto" and not args:
            strategy = make(r=4, announce=False)
        original(self, *args, strategy=strategy, **kwargs)

    _AcceleratorConnector.__init__ = connect  # type: ignore[method-assign]


def use_inject() -> None:
    """Puts ``inject`` and its companions in the place of PEFT's public functions."""
    import peft

    from tools.upstream.adapted_model import AdaptedModel

    def get_peft_model(
        model: nn.Module, peft_config: Any, adapter_name: str = "default", **_: Any
    ) -> AdaptedModel:
        INJECTED.append(type(model).__name__)
        return AdaptedModel(model, peft_config, adapter_name)

    def from_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> AdaptedModel:
        INJECTED.append(type(model).__name__)
        return AdaptedModel.from_pretrained(model, *args, **kwargs)

    def get_peft_model_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, AdaptedModel):
            return model.adapter_state_dict(*args, **kwargs)
        return original_state_dict(model, *args, **kwargs)

    original_state_dict = peft.get_peft_model_state_dict
    peft.get_peft_model = peft.mapping_func.get_peft_model = get_peft_model
    peft.get_peft_model_state_dict = get_peft_model_state_dict
    peft.PeftModel.from_pretrained = staticmethod(from_pretrained)


SIDES: dict[str, Callable[[], None]] = {
    "lora": functools.partial(use_strategy, LoRAStrategy),
    "qlora": functools.partial(use_strategy, QLoRAStrategy),
    "inject": use_inject,
}

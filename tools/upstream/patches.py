"""What the tests of other projects are run under: a Trainer or PEFT's functions with adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

from lightning_peft import LoRAStrategy, QLoRAStrategy, engine
from lightning_peft.errors import TargetModulesError
from lightning_peft.plugin import lifecycle
from tools.upstream.adapted_model import AdaptedModel
from tools.upstream.plugin import INJECTED


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

    patched: Any = engine
    patched.inject_config = inject_config


def _ask_for_existing_adapters() -> None:
    """Lets a further Trainer of one module ask for the layers that were named before."""
    original = lifecycle.with_adapter_defaults

    def with_adapter_defaults(settings: Any, arguments: Any, module: Any) -> Any:
        settings = original(settings, arguments, module)
        record = engine.record_of(module)
        if record is not None and arguments.target_modules is None:
            adapters = [one for part in record.parts.values() for one in part.adapters.values()]
            settings.peft_config.target_modules = {n for one in adapters for n in one.targets}
        return settings

    lifecycle.with_adapter_defaults = with_adapter_defaults


def use_strategy(make: Callable[..., Any]) -> None:
    """Gives each Trainer that names no strategy the one that ``make`` returns."""
    _count_injections()
    _ask_for_existing_adapters()
    connector: Any = _AcceleratorConnector
    original = connector.__init__

    @functools.wraps(original)
    def connect(self: Any, **kwargs: Any) -> None:
        strategy = kwargs.get("strategy", "auto")
        if isinstance(strategy, str) and strategy == "auto":
            # The tests' learning rates just hold for full training of one layer.
            kwargs["strategy"] = make(r=4, lora_alpha=0.1, announce=False)
        original(self, **kwargs)

    connector.__init__ = connect


def use_inject() -> None:
    """Puts ``inject`` and its companions in the place of PEFT's public functions."""

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

    patched: Any = peft
    original_state_dict = peft.get_peft_model_state_dict
    patched.get_peft_model = patched.mapping_func.get_peft_model = get_peft_model
    patched.get_peft_model_state_dict = get_peft_model_state_dict
    patched.PeftModel.from_pretrained = staticmethod(from_pretrained)


SIDES: dict[str, Callable[[], None]] = {
    "lora": functools.partial(use_strategy, LoRAStrategy),
    "qlora": functools.partial(use_strategy, QLoRAStrategy),
    "inject": use_inject,
}

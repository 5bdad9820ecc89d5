"""Conversion of models wrapped by PEFT to in-place adapters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel
from torch import Tensor, nn

from lightning_peft.compat.peft import (
    BaseTuner,
    BaseTunerLayer,
    ModulesToSaveWrapper,
    MultiheadAttention,
    ParamWrapper,
)
from lightning_peft.compat.transformers import forget_peft_adapters
from lightning_peft.engine.adapters import adapter_parameters
from lightning_peft.engine.configuration import as_peft_config, config_differences
from lightning_peft.engine.configuration import config_to_dict as fields_of
from lightning_peft.engine.layers.dora import MAGNITUDE
from lightning_peft.engine.methods.lora_config import changes_base
from lightning_peft.engine.methods.registry import METHODS, in_place_method
from lightning_peft.engine.selection.parts import inside
from lightning_peft.engine.selection.rows import written_rows
from lightning_peft.errors import LifecycleError, UnsupportedError, itemize

log = logging.getLogger(__name__)


@dataclass
class PeftWrapped:
    """One submodule that PEFT put adapters into.

    Attributes:
        name: Dotted name inside the module.
        part: The submodule.
        adapter_name: The adapter's name.
        config: PEFT's config, with the layers and modules that it really met.
        layers: PEFT's wrappers by the name of the layer.
        saved: PEFT's wrappers of modules that are trained in full.
        values: ``A`` and ``B``, by the names of their parameters.
    """

    name: str
    part: nn.Module
    adapter_name: str
    config: PeftConfig
    layers: dict[str, Any]
    saved: dict[str, Any]
    values: dict[str, Tensor] = field(default_factory=dict)


def find_peft_wrapped(module: nn.Module, known: Iterable[str] = ()) -> list[PeftWrapped]:
    """Returns the submodules that carry adapters of PEFT."""
    found, problems = [], []
    for name, part in _owners(module):
        if name in known:
            continue
        layers = {n: x for n, x in part.named_modules() if isinstance(x, BaseTunerLayer)}
        layers = {
            n: x for n, x in layers.items() if not inside(n, [up for up in layers if up != n])
        }
        if not layers:
            continue
        problem = _problem(part, layers)
        if problem:
            problems.append(f"{name or type(part).__name__}: {problem}")
            continue
        saved = {n: x for n, x in part.named_modules() if isinstance(x, ModulesToSaveWrapper)}
        ((adapter_name, config),) = part.peft_config.items()  # type: ignore[union-attr, operator]
        exact = _exact(config, list(layers), list(saved))
        if getattr(config, "bias", "none") != "none":
            log.warning(
                "PEFT keeps no copy of biases that it trains (bias=%r), so with adapters disabled, "
                "%s has the biases that it has now.",
                config.bias,
                name or type(part).__name__,
            )
        found.append(PeftWrapped(name, part, adapter_name, exact, layers, saved))
    fields = [fields_of(part.config) for part in found]
    if any(config_differences(fields[0], other) for other in fields[1:]):
        problems.append("the wrapped parts have different settings")
    if problems:
        raise UnsupportedError(
            "PEFT already put adapters into the module, which cannot be taken over:"
            + itemize(problems)
            + "\nGive the strategy the model without get_peft_model, and the config as "
            "`peft_config`."
        )
    return found


def _owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_modules():
        tuner = isinstance(child, (BaseTuner, PeftModel))
        if not tuner and "peft_config" in child.__dict__:
            yield name, child


def _problem(part: Any, layers: dict[str, Any]) -> str | None:
    configs = list(part.peft_config.values())
    if len(configs) != 1:
        return f"it has several adapters ({', '.join(part.peft_config)})"
    (config,) = configs
    if any(isinstance(layer, ParamWrapper) for layer in layers.values()):
        named = sorted(getattr(config, "target_parameters", None) or [])
        return f"target_parameters={named} put them on parameters, such as weights of experts"
    kind: Any = getattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "tuner_layer_cls", ())
    in_place = config.peft_type in METHODS and in_place_method(config)
    if not in_place or not all(isinstance(layer, kind) for layer in layers.values()):
        return f"{type(config).__name__} with these settings works through PEFT's own layers only"
    if changes_base(config):
        return f"init_lora_weights={config.init_lora_weights!r} rewrote its base"
    if any(layer.merged for layer in layers.values()):
        return "its adapters are merged"
    return None


def _exact(config: PeftConfig, layers: list[str], saved: list[str]) -> PeftConfig:
    exact: Any = copy.deepcopy(config)
    exact.target_modules, exact.modules_to_save = set(layers), saved or None
    exact.inference_mode = False
    always = {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    for name, value in {**always, "init_lora_weights": True}.items():
        if hasattr(exact, name):
            setattr(exact, name, value)
    return as_peft_config(exact)


def check_requested_config(
    wrapped: list[PeftWrapped],
    config: Any | None,
    adapt: str | Iterable[str] | None,
    adapter_name: str,
) -> None:
    """Compares the settings of wrapped parts with the requested ones."""
    problems = []
    if config is not None:
        fields, theirs = fields_of(wrapped[0].config), fields_of(config)
        problems += [
            f"{key}={fields.get(key)!r} in the module, asked for {theirs.get(key)!r}"
            for key in config_differences(fields, theirs)
            if key not in ("init_lora_weights", "modules_to_save")
        ]
        if written_rows(getattr(config, "target_modules", None)):
            problems.append("adapters on all rows, asked for some in target_modules")
    names = sorted(part.name for part in wrapped)
    parts = [adapt] if isinstance(adapt, str) else adapt
    if parts is not None and sorted(parts) != names:
        problems.append(f"adapters on {names}, asked for adapt={sorted(parts)}")
    known = wrapped[0].adapter_name
    if adapter_name not in ("default", known):
        problems.append(f"an adapter called {known!r}, asked for {adapter_name!r}")
    if problems:
        raise LifecycleError(
            "PEFT already put adapters into the module, with other settings than were asked for:"
            + itemize(problems)
            + "\nLeave the LoRA arguments at their defaults to train the adapters that are there, "
            "or give the strategy the model without get_peft_model."
        )


@contextmanager
def unwrapped_peft_layers(module: nn.Module, wrapped: list[PeftWrapped]) -> Iterator[None]:
    """Puts the layers back under their own names; if the body fails, PEFT's wrappers again."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    for part in wrapped:
        found = adapter_parameters(part.part)
        part.values = {_name_in_place(name): value for name, value in found.items()}
        for name, layer in part.layers.items():
            base = layer.get_base_layer()
            if isinstance(layer, MultiheadAttention):
                # Its output projection is wrapped too.
                undo.append(_exchange(base, "out_proj", base.out_proj.get_base_layer()))
            undo.append(_exchange(part.part, name, base))
        for name, wrapper in part.saved.items():
            trained = wrapper.modules_to_save[part.adapter_name]
            undo.append(_exchange(part.part, name, trained))
    try:
        yield
    except BaseException:
        for parent, leaf, child in undo:
            setattr(parent, leaf, child)
        raise
    for part in wrapped:
        _restore(part)


def _name_in_place(name: str) -> str:
    """What a tensor in PEFT's wrapper is called on the layer itself."""
    # An attention's output projection is not below a wrapper any more.
    plain = name.replace(".base_layer.", ".")
    return plain.removesuffix(".weight") if f".{MAGNITUDE}." in plain else plain


def values_before_training(wrapped: PeftWrapped) -> dict[str, Tensor]:
    """Returns the values before training of all that PEFT trained in full, on the CPU, by name."""
    return {
        f"{name}.{key}": value.detach().cpu().clone()
        for name, wrapper in wrapped.saved.items()
        for key, value in wrapper.original_module.state_dict().items()
    }


def _exchange(part: nn.Module, name: str, new: nn.Module) -> tuple[nn.Module, str, nn.Module]:
    owner, _, leaf = name.rpartition(".")
    parent = part.get_submodule(owner)
    old: nn.Module = getattr(parent, leaf)
    setattr(parent, leaf, new)
    return parent, leaf, old


@torch.no_grad()
def _restore(wrapped: PeftWrapped) -> None:
    for name, factor in adapter_parameters(wrapped.part).items():
        factor.copy_(wrapped.values[name])
    if not any(isinstance(child, BaseTunerLayer) for child in wrapped.part.modules()):
        forget_peft_adapters(wrapped.part)

"""Adapters of a module: tensors, activation, and disabling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.peft import BaseTunerLayer
from lightning_peft.engine.layers.adapter import AdapterLayer, enable_adapters
from lightning_peft.engine.layers.attention import PROJECTION, projections
from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.record import (
    AdaptedModuleRecord,
    adapted_parts,
    record_of,
    require_record,
)
from lightning_peft.errors import ConfigError, LifecycleError, itemize


def adapted_layers(part: nn.Module) -> dict[str, Any]:
    """Returns the layers that carry adapters, in place or wrapped by PEFT, by name."""
    return {
        name: layer
        for name, layer in part.named_modules()
        if isinstance(layer, (AdapterLayer, BaseTunerLayer))
    }


def adapted_layers_of(module: nn.Module) -> dict[str, Any]:
    """Returns the adapted layers of all parts, by their names inside ``module``."""
    return {
        entry.qualified(name) if name else entry.name: layer
        for entry, part in adapted_parts(module)
        for name, layer in adapted_layers(part).items()
    }


def adapter_parameters(part: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the tensors of all adapters on ``part``, active or not, by name.

    Found by where they are, not by what they are called: a base layer may be called ``lora_A``.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, layer in adapted_layers(part).items():
        for name, param in layer.named_parameters():
            if isinstance(layer, AdapterLayer):
                own = name.partition(".")[0] in layer.adapter_layer_names
            else:
                own = not name.startswith("base_layer.")
            if own:
                found[f"{prefix}.{name}" if prefix else name] = param
    return found


def adapter_file_tensors(
    part: nn.Module, targets: Iterable[str], name: str
) -> dict[str, nn.Parameter]:
    """Returns the tensors of an adapter in place on the layers ``targets``, by PEFT's keys."""
    layers: dict[str, Any] = {target: part.get_submodule(target) for target in targets}
    # PEFT keeps that of a projection in its wrapper of the attention.
    behind = {
        name: f"{name.removesuffix(PROJECTION)}base_layer.{PROJECTION}"
        for name in projections(part, layers)
    }
    return {
        f"{behind.get(target) or _name_in_file(target, layers)}.{key}": param
        for target, layer in layers.items()
        for key, param in layer.adapter_tensors(name).items()
    }


def _name_in_file(target: str, layers: dict[str, Any]) -> str:
    """What PEFT calls the wrapper in which it keeps the adapter of a layer.

    It wraps experts once for each of their parameters, in the order of these, from the inside.
    """
    layer = layers[target]
    if not isinstance(layer, ExpertWeight):
        return target
    adapted = [
        x.parameter_name for x in layers.values() if getattr(x, "owner", None) is layer.owner
    ]
    order = [name for name in layer.owner._parameters if name in adapted]
    outside = len(order) - 1 - order.index(layer.parameter_name)
    return target.rpartition(".")[0] + ".base_layer" * outside


def all_adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the tensors of all adapters on ``module``; an empty list where there are none."""
    parts = adapted_parts(module) if record_of(module) else ()
    return [param for _, part in parts for param in adapter_parameters(part).values()]


def adapter_buffers(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Returns the floating-point buffers of adapters, each with the dictionary that holds it."""
    return [
        (child._buffers, key, value)
        for _, part in (adapted_parts(module) if record_of(module) else ())
        for layer in adapted_layers(part).values()
        for name, child in layer.named_modules()
        if isinstance(layer, BaseTunerLayer) and name.partition(".")[0] != "base_layer"
        for key, value in child._buffers.items()
        if value is not None and value.is_floating_point()
    ]


def trained_parameters(part: nn.Module, entry: AdaptedModuleRecord) -> dict[str, nn.Parameter]:
    """Parameters that injection made trainable in ``part``: adapters, saved modules and biases."""
    params = dict(part.named_parameters())
    saved = {name: params[name] for name in entry.initial_values if name in params}
    mine = {**adapter_parameters(part), **saved}
    return {name: param for name, param in mine.items() if param.requires_grad}


def trained_heads(part: nn.Module, heads: Iterable[str]) -> list[str]:
    """Returns those of ``heads`` with own parameters that get gradients."""
    adapters = {id(param) for param in adapter_parameters(part).values()}
    return [
        head
        for head in heads
        if any(
            param.requires_grad and id(param) not in adapters
            for param in part.get_submodule(head).parameters()
        )
    ]


def activate(part: nn.Module, names: tuple[str, ...]) -> None:
    """Makes ``names`` the adapters that run and train on the layers of ``part``."""
    for layer in part.modules():
        if isinstance(layer, AdapterLayer):
            layer.active_adapters = names
            layer.train_adapters(names)


def set_adapter(module: nn.Module, names: str | Iterable[str]) -> None:
    """Chooses which adapters run and train; the others rest on the module.

    Args:
        module: A module with adapters.
        names: One name, or several whose outputs then add up.

    Raises:
        ConfigError: If a name is unknown; the known ones are listed. Or if several train the
            same rows of an embedding.
        LifecycleError: If the module has no adapters, or others are merged into its weights.
    """
    record = require_record(module)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in chosen if name not in record.adapter_names]
    if unknown or not chosen:
        raise ConfigError(
            f"set_adapter({list(chosen)!r}): this module's adapters are "
            f"{', '.join(map(repr, record.adapter_names))}. Use disable_adapters() for none."
        )
    if set(chosen) != set(record.active):
        refuse_merged(module, "Choosing other adapters")
    layers = {n: x for n, x in adapted_layers_of(module).items() if isinstance(x, AdapterLayer)}
    problems = [f"{n}: {why}" for n, x in layers.items() if (why := x.conflict(chosen))]
    if problems:
        raise ConfigError(
            f"set_adapter({list(chosen)!r}): these adapters cannot run together:"
            + itemize(problems)
        )
    record.active = chosen
    for _, part in adapted_parts(module):
        activate(part, chosen)


def refuse_merged(module: nn.Module, what: str) -> None:
    """Refuses ``what`` while adapters are folded into the weights."""
    layers = adapted_layers_of(module)
    merged = [name for name, layer in layers.items() if is_merged(layer)]
    if merged:
        raise LifecycleError(
            f"{what} would leave adapters in effect that are merged into the weights of:"
            + itemize(merged, 5)
            + "\nCall lightning_peft.unmerge(module) first."
        )


def adapters_have_no_effect(module: nn.Module) -> bool:
    """Whether it is known that every adapter of ``module`` changes nothing yet."""
    layers = adapted_layers_of(module).values()
    return all(isinstance(layer, AdapterLayer) and layer.has_no_effect() for layer in layers)


@contextmanager
def disable_adapters(module: nn.Module) -> Iterator[None]:
    """Runs the body with the base model: no adapter, and ``modules_to_save`` as they were.

    Heads that injection left alone keep the values they have now. Nests, and restores on
    exceptions. The reference model of preference tuning is this, without a second copy. Under
    autocast the body casts weights again: a cached copy is of other values, or has no gradient.

    Raises:
        LifecycleError: If the module has no adapters, or merged ones.
    """
    refuse_merged(module, "Disabling adapters")
    layers = list(adapted_layers_of(module).values())
    before = [not layer.disable_adapters for layer in layers]
    caching = torch.is_autocast_cache_enabled()
    trained = _exchange(module, None)
    try:
        torch.set_autocast_cache_enabled(False)
        for layer in layers:
            enable_adapters(layer, False)
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        _exchange(module, trained)
        for layer, enabled in zip(layers, before, strict=True):
            enable_adapters(layer, enabled)


def is_merged(layer: Any) -> bool:
    """Whether adapters of ``layer`` are folded into its weight."""
    return bool(layer.merged_adapters)


def _exchange(module: nn.Module, values: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Puts ``values``, or the values before training, into everything that is trained in full."""
    before: dict[str, Tensor] = {}
    for entry, part in adapted_parts(module):
        tensors = dict(part.named_parameters()) | dict(part.named_buffers())
        for name, original in entry.initial_values.items():
            key, tensor = entry.qualified(name), tensors[name]
            before[key] = tensor.data
            tensor.data = (original if values is None else values[key]).to(
                device=tensor.device, dtype=tensor.dtype, copy=values is None
            )
    return before

"""State dicts without the frozen base, and their strict loading.

A module may override ``state_dict()`` or ``load_state_dict()``, and hooks may filter or rename
keys, to leave its pretrained part out. That part now has adapters. What injection added is
therefore found by the record of the injection, in both directions, and not by the module's own
methods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import persistent_buffers
from lightning_peft.engine.adapters import adapted_layers, adapter_parameters, refuse_merged
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.layers.expert_weights import weight_name
from lightning_peft.engine.record import AdaptedModuleRecord, require_record
from lightning_peft.errors import CheckpointError, itemize


def trainable_state_dict(module: nn.Module) -> dict[str, Any]:
    """Returns ``module.state_dict()`` without the frozen base parameters, and all adapters.

    What stays: adapters, heads, modules trained in full, every parameter outside the adapted
    parts, and all persistent buffers. Decided by the names recorded at injection, not by
    ``requires_grad``, which optimizers and callbacks toggle. Adapters, heads, modules trained in
    full and buffers of adapted parts are there even where an own ``state_dict()`` leaves them out.
    """
    own, known = checkpoint_tensors(module), named_tensors(module).keys()
    places = {_place(tensor) for tensor in own.values()} - {None}
    state = {
        key: value
        for key, value in drop_frozen_base(module, module.state_dict()).items()
        # Once, under their names in the module, whatever an own state_dict() calls them.
        if key in known or not isinstance(value, Tensor) or _place(value) not in places
    }
    return {**state, **{name: value for name, value in own.items() if name not in state}}


def checkpoint_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that no checkpoint may lack, by name: detached, sharing memory.

    Adapters, heads, modules trained in full, base weights that came from an adapter folder, and the
    persistent buffers of adapted parts.
    """
    named = named_tensors(module)
    names = (
        entry.qualified(name)
        for entry in require_record(module).parts.values()
        for name in _own_of_part(module.get_submodule(entry.name), entry)
    )
    return {name: named[name].detach() for name in names if name in named}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def adapter_names_of(module: nn.Module) -> list[str]:
    """Returns the names of the tensors of all adapters, relative to ``module``."""
    return [
        entry.qualified(name)
        for entry in require_record(module).parts.values()
        for name in adapter_parameters(module.get_submodule(entry.name))
    ]


def _own_of_part(part: nn.Module, entry: AdaptedModuleRecord) -> Iterator[str]:
    yield from adapter_parameters(part)
    yield from entry.initial_values
    yield from entry.replaced
    layers = [f"{name}." for name in adapted_layers(part) if name]
    heads = tuple(f"{name}." for name in entry.heads)
    for name, child in part.named_modules():
        prefix = f"{name}." if name else ""
        if heads and prefix.startswith(heads):
            yield from (prefix + leaf for leaf in child._parameters)
        if not prefix.startswith(tuple(layers)):
            # Inside an adapted layer they are constants of the base, such as packed weights.
            yield from (prefix + leaf for leaf in persistent_buffers(child))


def drop_frozen_base(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``state`` without the frozen base, also where its keys were renamed."""
    frozen = require_record(module).frozen
    keys: dict[Any, set[str]] = defaultdict(set)
    for key, value in state.items():
        if isinstance(value, Tensor):
            keys[_place(value)].add(key)
    keys[None] = set()
    names = {
        name: {name, *keys[_place(parameter)]}
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if name in frozen
    }
    gone = set().union(frozen, *names.values(), _companions(module, names))
    return {
        key: value
        for key, value in state.items()
        # A name and all that it is below.
        if gone.isdisjoint(accumulate(key.split("."), "{}.{}".format))
    }


def same_memory(one: Any, other: Any) -> bool:
    """Whether both are tensors, and views of the same memory in the same way."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    place = _place(one)
    return place is not None and place == _place(other)


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """Identifies a tensor's memory; ``None`` where it has none, or is spread over processes."""
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "device_mesh"):
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _companions(module: nn.Module, names: Mapping[str, set[str]]) -> set[str]:
    """Returns the keys that some backends write next to a quantized weight, such as ``"a.SCB"``.

    ``names`` are all names of each frozen parameter.
    """
    return {
        weight.removesuffix(child.weight_name) + key
        for name, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, QuantizedLayer)
        for weight in names.get(weight_name(name, child.weight_name), ())
        for key in child.quantization_keys()
    }


def tensor_problems(
    expected: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str,
    optional: Collection[str] = (),
) -> list[str]:
    """Returns which tensors ``given``, of a file, lacks, has besides, or has in another shape."""
    problems = [f"missing: {key}" for key in expected if key not in given and key not in optional]
    problems += [f"unexpected: {key}" for key in given if key not in expected]
    problems += [
        f"{key}: {tuple(given[key].shape)} in the {where}, {tuple(value.shape)} in the module"
        for key, value in expected.items()
        if isinstance(value, Tensor)
        and isinstance(given.get(key), Tensor)
        and value.shape != given[key].shape
    ]
    return problems


def load_trainable_state_dict(
    module: nn.Module,
    state: Mapping[str, Any],
    kept: Mapping[str, Tensor] | None = None,
    removed: Iterable[str] = (),
) -> None:
    """Loads what :func:`trainable_state_dict` returned, strictly.

    Args:
        module: A module with adapters.
        state: The values, by name.
        kept: Values of :func:`checkpoint_tensors` for those that hooks of the module took out of
            ``state``, before or after it was written.
        removed: Other names that may be missing: those that hooks took out when the file was
            written (``strict_loading=False``), and the weights that the file leaves out.

    Raises:
        CheckpointError: If a key is missing, unexpected, or has another shape; every one of them
            is named.
        LifecycleError: If the module has no adapters, or merged ones.
    """
    record = require_record(module)
    refuse_merged(module, "Loading other values")
    expected, own = trainable_state_dict(module), checkpoint_tensors(module)
    full = set(record.frozen) & set(state)
    if full:
        raise CheckpointError(
            f"The checkpoint holds the base model too ({len(full)} frozen tensors such as "
            f"{min(full)!r}): it was not written by a strategy or callback of lightning_peft. Load "
            "it into the LightningModule before training (load_from_checkpoint), and let the "
            "strategy add adapters to that."
        )
    state = {**{name: value for name, value in (kept or {}).items() if name in own}, **state}
    optional = set(removed) - set(own)
    problems = tensor_problems(expected, state, "checkpoint", optional)
    if problems:
        raise CheckpointError(
            f"The checkpoint does not fit the adapted {type(module).__name__}:"
            + itemize(problems)
            + "\nThe module, `target_modules`, `r` and `modules_to_save` must be those of the run "
            "that wrote it."
        )
    # Before the rest: quantized layers take no state of other frozen weights.
    for name, layer in quantized_holders(module, own).items():
        layer.load_weight(state, name.removesuffix(layer.weight_name))
    module.load_state_dict(state, strict=False)
    with torch.no_grad():
        for name, tensor in own.items():
            # An own load_state_dict() may leave them out as well.
            tensor.copy_(state[name])


def quantized_holders(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Returns the quantized layers among the owners of parameters, by the names of these."""
    held = ((name, *name.rpartition(".")[::2]) for name in names)
    layers = ((name, module.get_submodule(owner), key) for name, owner, key in held)
    return {
        name: layer
        for name, layer, key in layers
        if isinstance(layer, QuantizedLayer) and key == layer.weight_name
    }

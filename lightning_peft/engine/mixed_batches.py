"""Different adapters per row of a batch, as PEFT's ``adapter_names``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import saved_tensors_hooks_in_use
from lightning_peft.engine.adapters import adapted_layers, refuse_merged
from lightning_peft.engine.layers.adapter import AdapterLayer, without_adapters
from lightning_peft.engine.layers.dora import DoraLayer
from lightning_peft.engine.layers.kinds import ADAPTABLE, has_standard_forward
from lightning_peft.engine.layers.lora import LoraConvolution, LoraLinear
from lightning_peft.engine.layers.tokens import TiedRows
from lightning_peft.engine.record import adapted_parts, require_record
from lightning_peft.errors import ConfigError, UnsupportedError, itemize

BASE = "__base__"
_PATCHED = ("forward", "effective_weight")


@contextmanager
def mixed_adapters(module: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the body, each row of a batch goes through the adapter that is named for it.

    The product with the base is computed for the whole batch, and the low-rank products for the
    rows of each adapter. Which adapters are active does not matter; those that
    :func:`lightning_peft.set_adapter` chose get gradients. For beam search, name each beam's.

    Args:
        module: A module with adapters.
        adapter_names: The adapter of each row of the first dimension; ``"__base__"`` for none.

    Raises:
        ConfigError: If a name is unknown.
        LifecycleError: If the module has no adapters, or merged ones.
        UnsupportedError: If adapters are on layers other than linear layers, convolutions or
            embeddings, or in PEFT's wrappers; or if weights were trained in full, which all rows
            share. Within the body: if a layer gets another number of rows, its weight is read, or
            its output would be computed again by a backward pass outside of the body.
    """
    names = list(adapter_names)
    known = require_record(module).adapter_names
    unknown = sorted({*names} - {*known, BASE})
    if unknown or not names:
        raise ConfigError(
            f"adapter_names={names!r}: this module's adapters are {', '.join(map(repr, known))}, "
            f"and {BASE!r} is the base without one."
        )
    refuse_merged(module, "Mixing adapters")
    layers = _layers(module)
    _check(module, layers, names)
    groups = {name: [i for i, one in enumerate(names) if one == name] for name in {*names}}
    owners = [layer for layer in layers.values() if isinstance(layer, AdapterLayer)]
    active = [layer.active_adapters for layer in owners]
    before = {
        layer: {key: layer.__dict__[key] for key in _PATCHED if key in layer.__dict__}
        for layer in layers.values()
    }
    try:
        for name, layer in layers.items():
            # So that code that reads its weight gets a view, which would compute it.
            _owner(layer).active_adapters = tuple(groups)
            layer.__dict__["forward"] = partial(_mixed_forward, name, layer, groups, len(names))
            layer.__dict__["effective_weight"] = partial(_refuse_reading, name)
        yield
    finally:
        for layer, attributes in before.items():
            for key in _PATCHED:
                layer.__dict__.pop(key, None)
            layer.__dict__.update(attributes)
        for layer, chosen in zip(owners, active, strict=True):
            layer.active_adapters = chosen


def _layers(module: nn.Module) -> dict[str, Any]:
    """The layers that compute with adapters, those that are tied to trained rows among them."""
    found: dict[str, Any] = {}
    for entry, part in adapted_parts(module):
        tied = {name: x for name, x in part.named_modules() if isinstance(x, TiedRows)}
        found |= {entry.qualified(n): x for n, x in {**adapted_layers(part), **tied}.items()}
    return found


def _owner(layer: Any) -> AdapterLayer:
    owner: AdapterLayer = getattr(layer, "token_layer", layer)
    return owner


def _check(module: nn.Module, layers: Mapping[str, Any], names: list[str]) -> None:
    problems = [
        f"{name} ({type(layer).__name__}): its input is not a batch of rows, or PEFT wraps it"
        for name, layer in layers.items()
        if not isinstance(layer, (AdapterLayer, TiedRows)) or not isinstance(layer, ADAPTABLE)
    ]
    if len({*names}) > 1:
        problems += [
            f"{entry.qualified(name)}: it was trained in full, and all rows would have it"
            for entry, _ in adapted_parts(module)
            for name in entry.initial_values
        ]
    if problems:
        raise UnsupportedError("The adapters cannot be mixed in a batch:" + itemize(problems, 5))


def _mixed_forward(
    name: str, layer: Any, groups: Mapping[str, list[int]], count: int, *args: Any, **kwargs: Any
) -> Tensor:
    """The output of ``layer``, of which each row is that of its own adapter."""
    x = args[0] if args else next(iter(kwargs.values()))
    if len(x) != count:
        raise UnsupportedError(
            f"{name} gets {len(x)} rows, and adapter_names names {count}: name one for each row of "
            "the batch, of each beam and returned sequence too. Inputs without a first dimension "
            "of rows (packed without padding, routed to experts, time first) cannot be mixed."
        )
    _refuse_recomputation(layer)
    owner = _owner(layer)
    # Not by the attribute on the object, which is this function.
    forward = partial(type(layer).forward, layer)
    if owner.disable_adapters:
        output: Tensor = forward(*args, **kwargs)
        return output
    plain = isinstance(layer, (LoraLinear, LoraConvolution)) and not isinstance(layer, DoraLayer)
    if not plain or not has_standard_forward(layer):
        return _by_group(layer, forward, groups, args, kwargs)
    with without_adapters(layer):
        output = forward(*args, **kwargs)
    for key in (key for key in groups if key in layer.adapter_settings):
        rows = torch.tensor(groups[key], device=x.device)
        part = layer.lora_dropout[key](x[rows])
        added = layer.adapter_output(key, part, *args[1:], **kwargs)
        add = Tensor.index_add if torch.is_grad_enabled() else Tensor.index_add_
        output = add(output, 0, rows, added.to(output.dtype))
    return output


def _by_group(
    layer: Any, forward: Any, groups: Mapping[str, list[int]], args: Any, kwargs: Any
) -> Tensor:
    """The same for any layer: its own forward pass for the rows of each adapter."""
    owner, outputs = _owner(layer), []
    refusals = {one: one.__dict__.pop("effective_weight") for one in {layer, owner}}
    try:
        for key, rows in groups.items():
            owner.active_adapters = () if key == BASE else (key,)
            some = [arg[rows] if isinstance(arg, Tensor) else arg for arg in args]
            named = {k: arg[rows] if isinstance(arg, Tensor) else arg for k, arg in kwargs.items()}
            outputs.append(forward(*some, **named))
    finally:
        owner.active_adapters = tuple(groups)
        for one, refusal in refusals.items():
            one.__dict__["effective_weight"] = refusal
    places = torch.tensor([row for rows in groups.values() for row in rows])
    joined = torch.cat(outputs)
    return joined[places.argsort().to(joined.device)]


def _refuse_reading(name: str) -> Tensor:
    raise UnsupportedError(
        f"The weight of {name} is read while the rows of a batch have different adapters: each "
        "row has another weight. Modules that read weights in place of calling their layers cannot "
        "be mixed; run them with one adapter at a time."
    )


def _refuse_recomputation(layer: nn.Module) -> None:
    recomputed = torch.is_grad_enabled() and saved_tensors_hooks_in_use() is not None
    if recomputed or (layer.training and not torch.is_grad_enabled()):
        raise UnsupportedError(
            "Gradient checkpointing with mixed adapters: what the backward pass computes again "
            "would have others. Train with gradient_checkpointing=False; to run a model without "
            "gradients, set it to eval mode."
        )

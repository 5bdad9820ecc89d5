"""Copies of adapted parts made after injection, and their averaging.

``on_fit_start`` and ``on_train_start`` are called when the adapters are there: what ``deepcopy``
makes then has the adapters already, and only has to follow.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection

from torch import nn

from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.momentum_copies import (
    are_equal,
    check_momentum_copies,
    freeze_copy,
    frozen_names,
    hide_frozen_base,
)
from lightning_peft.engine.record import MomentumCopy, Record, record_of, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError

_WRITES = re.compile(
    r"can't be cast to the desired output type (Byte|Char)|not implemented for '(Byte|Char)'"
)

_UNFREEZES = re.compile(r"only Tensors of floating point .*dtype can require gradients")

_SHAPES = re.compile(r"The size of tensor a \(\d+\) must match the size of tensor b \(\d+\)")


def link_late_copies(module: nn.Module) -> list[MomentumCopy]:
    """Makes copies follow that ``module`` made of its adapted parts after the injection.

    Their adapters do not train: no optimizer holds them, since the optimizers are older.

    Returns:
        What was found, and is in the record now.
    """
    record = require_record(module)
    known = {module.get_submodule(name) for name in _targets(record)}
    late = {
        name
        for name, child in module.named_modules()
        if isinstance(child, AdapterLayer) and child not in known
    }
    momentum_copies: list[MomentumCopy] = []
    for name, child in module.named_modules() if late else ():
        layers = {n for n in late if inside(n, [name])}
        if not name or not layers or inside(name, [pair.copy for pair in momentum_copies]):
            continue
        source = _copied(module, child, known)
        if source is not None:
            momentum_copies.append(MomentumCopy(source, name, True))
    for pair in momentum_copies:
        freeze_copy(module, pair)
    hide_frozen_base(
        module,
        momentum_copies,
        record.frozen.union(*(frozen_names(record, pair) for pair in momentum_copies)),
    )
    record.momentum_copies += momentum_copies
    if momentum_copies:
        check_momentum_copies(module)
    return momentum_copies


def _targets(record: Record) -> set[str]:
    return {
        part.qualified(target)
        for part in record.parts.values()
        for info in part.adapters.values()
        if info.in_place
        for target in info.targets
    }


def _copied(module: nn.Module, child: nn.Module, known: set[nn.Module]) -> str | None:
    """Returns the name of the module that ``child`` is a copy of."""
    for name, other in module.named_modules():
        adapted = not known.isdisjoint(other.modules())
        if name and other is not child and adapted and are_equal(other, child):
            return name
    return None


def _in_hook(error: BaseException, callers: Collection[str]) -> bool:
    """Whether an error comes out of a hook that called no module."""
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name in frames for name in callers) and "_call_impl" not in frames


def _names_codes(text: str, layer: QuantizedLayer) -> bool:
    """Whether torch's error is one of writing to stored weights quantized as that of ``layer``."""
    _, _, keys = text.partition("Unexpected key(s) in state_dict: ")
    named = {name for key in layer.quantization_keys() for name in (f'.{key}"', f'"{key}"')}
    return bool(_WRITES.search(text)) or any(name in keys for name in named)


def explain_hook_error(
    module: nn.Module, error: Exception, callers: Collection[str]
) -> LifecycleError | None:
    """Explains an error of a hook that averages weights; ``None`` for other errors."""
    if record_of(module) is None:
        return None
    text = str(error)
    quantized = ((n, x) for n, x in module.named_modules() if isinstance(x, QuantizedLayer))
    name, layer = next(quantized, ("", None))
    if isinstance(error, RuntimeError) and layer is not None and _names_codes(text, layer):
        return LifecycleError(
            f"A hook computes with stored weights that are quantized, such as those of "
            f"{name!r}: packed codes cannot be averaged, and load into layers alike only. "
            "The frozen base does not change, so average what trains: loop over `parameters()` "
            "of a copy that the module holds, which leaves the base out, or over "
            "`named_parameters()` with `if p.requires_grad`; or use LoRAStrategy. torch says: "
            f"{text.splitlines()[0]}"
        )
    if isinstance(error, RuntimeError) and layer is not None and _UNFREEZES.match(text):
        return LifecycleError(
            f"A hook unfreezes weights that are quantized, such as those of {name!r}, by "
            "requires_grad or unfreeze(). The base stays frozen: leave out what requires_grad_ "
            "cannot train, as by `if 'lora_' in name` over `named_parameters()`, let "
            "BackboneFinetuning unfreeze adapters in stages, or name the layers to train in full "
            "in `modules_to_save`."
        )
    unexpected = text.partition("Unexpected key(s) in state_dict: ")[2]
    kinds = {kind for x in adapted_layers(module).values() for kind in x.adapter_layer_names}
    if isinstance(error, RuntimeError) and any(f".{kind}." in unexpected for kind in kinds):
        return LifecycleError(
            "A hook loads the state of adapted layers into layers without adapters. Make the copy "
            "by copy.deepcopy, or before the adapters are added (in `__init__` or `setup`). torch "
            f"says: {text[:200]}"
        )
    if isinstance(error, RuntimeError) and _SHAPES.search(text) and _in_hook(error, callers):
        return LifecycleError(
            "A hook computes with tensors whose shapes differ. If it goes through `parameters()` "
            "and through tensors that were kept before the adapters were added, such as the "
            "averages of an EMA in `__init__`, these do not line up: keep them in `on_fit_start`, "
            f"when the adapters are there. torch says: {text.splitlines()[0]}"
        )
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(key, str) and key in adapter_parameters(module):
        return LifecycleError(
            f"A hook looks up {key!r} in a dictionary that does not have it. It was probably made "
            "before the adapters were added, such as the averages of an EMA in `__init__`. Make it "
            "in `on_fit_start`, when the adapters are there."
        )
    return None

"""Static checks: adapters are present, enabled and trainable."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.backends.registry import backend_of, is_quantized
from lightning_peft.engine.record import AdaptedModuleRecord, adapted_parts

REPLACED = (
    "has no adapter any more: another layer was put in its place. Build it in `__init__`, `setup` "
    "or `configure_model`, or leave it out by `exclude_modules`"
)


def structural_problems(module: nn.Module) -> list[str]:
    """Returns the problems of the adapters, without a pass through the module.

    Each problem names a layer by its name inside ``module``. Found are: adapted layers that were
    replaced or switched off, layers that are no longer quantized, or are in bitsandbytes' form
    without a backward pass, and adapter tensors that are not finite or on another device than
    their layer.
    """
    problems: list[str] = []
    for entry, part in adapted_parts(module):
        problems += _layer_problems(part, entry) + _quantization_problems(part, entry)
        problems += _tensor_problems(part, entry)
    return problems


def _layer_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    layers = adapted_layers(part)
    targets = {target for info in entry.adapters.values() for target in info.targets}
    gone = [f"{entry.qualified(t)}: {REPLACED}" for t in sorted(targets - {*layers})]
    off = [
        f"{entry.qualified(n)}: the adapter is switched off"
        for n, layer in layers.items()
        if layer.disable_adapters
    ]
    return gone + off


def _quantization_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    modules = dict(part.named_modules())
    problems = []
    for name in entry.quantized:
        # Around a layer that PEFT wrapped, the quantized one is one name further down.
        layer: Any = modules.get(f"{name}.base_layer", modules.get(name))
        if layer is None or bool(getattr(layer, "merged_adapters", None)):
            continue
        if not is_quantized(layer):
            problems.append(f"{entry.qualified(name)}: is not quantized any more")
            continue
        stored = layer._parameters["weight"]
        backend = backend_of(stored)
        problem = None if backend is None else backend.storage_problem(stored)
        problems += [f"{entry.qualified(name)}: {problem}"] if problem else []
    return problems


def _tensor_problems(part: nn.Module, entry: AdaptedModuleRecord) -> list[str]:
    problems = []
    layers = adapted_layers(part)
    tensors = adapter_parameters(part)
    for layer in layers.values():
        own = {id(param) for param in adapter_parameters(layer).values()}
        mine = {n: param for n, param in tensors.items() if id(param) in own}
        elsewhere = {p.device for p in layer.parameters() if id(p) not in own}
        for tensor, param in mine.items():
            where = entry.qualified(tensor)
            if elsewhere and param.device not in elsewhere:
                devices = " and ".join(sorted(map(str, elsewhere)))
                problems.append(f"{where}: is on {param.device} and its layer on {devices}")
            elif not param.is_meta and not bool(torch.isfinite(param).all()):
                problems.append(f"{where}: has values that are not finite")
    return problems

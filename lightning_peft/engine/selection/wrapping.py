"""Layers supported by PEFT's wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.backends.registry import backend_for, backend_of, is_quantized
from lightning_peft.engine.layers.kinds import CONVOLUTIONS, is_dilated, pads_with_values
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.model_types import fused_kernel_problem
from lightning_peft.engine.selection.parts import inside


def wrapping_problems(
    part: nn.Module,
    targets: list[str],
    quantize: list[str],
    config: PeftConfig,
    quantization: Any | None,
) -> list[str]:
    """Returns where PEFT's wrappers, which replace layers in their parents, would go wrong."""
    names: dict[int, list[str]] = {}
    for name, child in part.named_modules(remove_duplicate=False):
        names.setdefault(id(child), []).append(name)
    readers = {
        name: type(child).__name__
        for name, child in part.named_modules()
        if isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    }
    problems = []
    for target in targets:
        layer = part.get_submodule(target)
        if len(names[id(layer)]) > 1:
            problems.append(
                f"{target} is also called {', '.join(names[id(layer)][1:])}, and PEFT would "
                "replace it under one name"
            )
        unused = fused_kernel_problem(part, target)
        problems += [unused] if unused else []
        reader = next((n for n in readers if n != target and inside(target, [n])), None)
        if reader is not None:
            problems.append(
                f"{target} lies in a {readers[reader]}, which reads weights past PEFT's layers"
            )
        if isinstance(layer, Conv1D) and (target in quantize or is_quantized(layer)):
            problems.append(f"{target} is a quantized Conv1D, which PEFT takes for a Linear")
        if method_of(config).dense_only and (target in quantize or is_quantized(layer)):
            stored = backend_of(stored_parameter(layer, "weight"))
            backend = stored or backend_for(quantization)
            problems.append(
                f"{target} is quantized, and {type(config).__name__} works on dense weights only. "
                f"Name it in `{backend.skip_argument}`, or do not quantize"
            )
        if isinstance(layer, CONVOLUTIONS):
            problems += [f"{target} {problem}" for problem in _convolution_problems(layer, config)]
    return problems


_Property = Callable[[Any], bool]


def _is_uneven(layer: Any) -> bool:
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    return any(isinstance(size, str) or len(set(size)) > 1 for size in sizes)


_PROPERTIES: dict[str, tuple[_Property, str]] = {
    "padding_mode": (pads_with_values, "padding_mode={layer.padding_mode!r}"),
    "dilation": (is_dilated, "dilation={layer.dilation}"),
    "groups": (lambda layer: layer.groups > 1, "groups={layer.groups}"),
    "uneven": (
        _is_uneven,
        "kernel_size={layer.kernel_size}, stride={layer.stride}, padding={layer.padding!r}, and "
        "uses one number of each",
    ),
}


def _convolution_problems(layer: nn.Module, config: PeftConfig) -> list[str]:
    left_out = [_PROPERTIES[name] for name in method_of(config).ignored_properties]
    return [
        f"has {said.format(layer=layer)}; PEFT's {type(config).__name__} with these settings "
        "computes another convolution. Leave it out by `exclude_modules`, or use plain LoRA"
        for holds, said in left_out
        if holds(layer)
    ]

"""ReLoRA, after Lialin et al. 2023 (arXiv 2307.05695): merge adapters and restart them.

The sum of many low-rank changes has a higher rank than one. The merged weights are a part of
checkpoints and folders from then on, since no one can load them again.

A quantized weight becomes the codes nearest to the sum, with the constants that it has, and the new
adapter starts as the nearest product of its rank to what that rounding loses, as LoftQ's (arXiv
2310.08659). Where an adapter moves no weight past the middle between two codes, nothing is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.engine.adapters import adapted_layers, adapted_layers_of
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.files.base_tensors import include_in_files
from lightning_peft.engine.gathering import from_first
from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.layers.kinds import TRANSPOSED, as_rows, from_rows
from lightning_peft.engine.layers.lora import LoraLayer, only_rows
from lightning_peft.engine.layers.mixin import class_key
from lightning_peft.engine.mergeable import base_parameters, check_mergeable
from lightning_peft.engine.merging import (
    MergedLayer,
    MergeReport,
    merge_layer,
    merge_layers,
    merged_weight,
    relative_norm,
)
from lightning_peft.engine.record import adapted_parts, refuse_sharded, require_record
from lightning_peft.errors import UnsupportedError, itemize

_INITS = (True, None, "gaussian")
# What optimizers call the running sums of gradients: torch's, bitsandbytes' and those that follow.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "state1")
_MOMENTS = re.compile(
    r"exp_avg\w*|exp_inf|max_exp_avg_sq|momentum_buffer|square_avg|grad_avg|acc_delta|sum|state[12]"
)


def check_restartable(module: nn.Module) -> None:
    """Looks for what keeps adapters of ``module`` from being merged while they train.

    Raises:
        LifecycleError: If the module has no adapters.
        UnsupportedError: If they cannot; every reason is named.
    """
    record = require_record(module)
    refuse_sharded(module, "Merging while adapters train")
    problems = []
    if len(record.adapter_names) > 1:
        names = ", ".join(map(repr, record.adapter_names))
        problems.append(f"several adapters ({names}): the others would run on another base")
    if record.momentum_copies:
        copies = ", ".join(repr(pair.copy) for pair in record.momentum_copies)
        problems.append(f"momentum copies ({copies}), whose base stays what it was")
    for entry, part in adapted_parts(module):
        inits = [info.config.get("init_lora_weights", True) for info in entry.adapters.values()]
        problems += [
            f"init_lora_weights={init!r}: adapters begin again by True or 'gaussian', which leave "
            "the base as it is and have no effect at first"
            for init in inits
            if init not in _INITS
        ]
        problems += [
            f"{name}: {reason}"
            for name, layer in adapted_layers(part).items()
            if (reason := _problem(layer)) is not None
        ]
    if problems:
        raise UnsupportedError(
            "Adapters cannot be merged and begun again on this module:" + itemize(problems, 5)
        )
    check_mergeable(module, adapted_layers_of(module))


def _problem(layer: Any) -> str | None:
    if not isinstance(layer, LoraLayer):
        return "only LoRA and DoRA in place can be begun again"
    if isinstance(layer, QuantizedLayer) and isinstance(layer, (ExpertWeight, *TRANSPOSED)):
        return (
            f"it is a quantized {class_key(layer)[2].__name__}, for which no new adapter starts at "
            "what rounding loses. Keep it dense: name it in llm_int8_skip_modules"
        )
    return None


def merge_and_restart(module: nn.Module, seed: int, processes: int = 1) -> MergeReport:
    """Merges the adapters of ``module`` into its weights, and gives them first values again.

    Args:
        module: A module that :func:`check_restartable` passed.
        seed: Of the first values. They are the same numbers on any device; on quantized layers,
            where they are decomposed from what rounding loses, in all processes.
        processes: How many processes do this, each with the same base and adapters; the
            decompositions are those of the first.

    Returns:
        The measured error of every layer: that of a quantized one with its new adapter, and without
        it in ``requantized_error``.
    """
    draw = torch.Generator().manual_seed(seed)
    configs = {
        id(layer): entry.adapters
        for entry, part in adapted_parts(module)
        for layer in adapted_layers(part).values()
    }

    def restart(layer: Any, name: str) -> MergedLayer | None:
        target = delta = None
        if isinstance(layer, QuantizedLayer):
            delta, target = _store_nearest(layer)
        merged = None if target is not None else merge_layer(layer, name)
        layer.merged_adapters = ()
        for adapter in layer.adapter_settings:
            _begin_again(layer, adapter, configs[id(layer)][adapter].config, draw)
            if delta is None or target is None:
                layer.start_adapter(adapter)
            else:
                merged = _start_at_rest(layer, name, adapter, (delta, target), seed, processes)
        return merged

    report = merge_layers(module, restart)
    for entry, part in adapted_parts(module):
        merged = []
        for name, layer in adapted_layers(part).items():
            held = base_parameters(layer, name)
            merged += [key for key in held if "bias" not in key.rpartition(".")[2]]
        include_in_files(module, entry, merged)
    return report


@torch.no_grad()
def _begin_again(layer: Any, name: str, config: dict[str, Any], draw: torch.Generator) -> None:
    """Gives an adapter values as PEFT does."""
    for key, param in layer.adapter_tensors(name).items():
        kind = key.partition(".")[0]
        if kind in ("lora_B", "lora_embedding_A"):
            param.zero_()
        elif kind in ("lora_A", "lora_embedding_B"):
            values = torch.empty(param.shape)
            if kind == "lora_embedding_B":
                nn.init.normal_(values, generator=draw)
            elif config["init_lora_weights"] == "gaussian":
                nn.init.normal_(values, std=1 / layer.adapter_settings[name].r, generator=draw)
            else:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=draw)
            param.copy_(values)


def _exact_weight(layer: Any) -> Tensor:
    """What the codes of a layer stand for, in float32."""
    return from_rows(layer, layer.backend.dequantize(layer.stored_weight(), torch.float32))


def _store_nearest(layer: Any) -> tuple[Tensor, Tensor]:
    """Merges into the codes; the sum of the adapters, and the weight as it should be."""
    delta, target = merged_weight(layer, _exact_weight(layer), layer.effective_adapters())
    layer.store_weight(target)
    return delta, target


def _start_at_rest(
    layer: Any, name: str, adapter: str, wanted: tuple[Tensor, Tensor], seed: int, processes: int
) -> MergedLayer:
    """Starts a new adapter at what the codes lack of a target: ``A`` as long as it was drawn."""
    delta, target = wanted
    rest = target - _exact_weight(layer)
    rounding = relative_norm(rest, delta)
    rows, settings = as_rows(layer, rest), layer.adapter_settings[adapter]
    rows = only_rows(rows, settings.rows) if settings.rows else rows
    a, b = (getattr(layer, kind)[adapter].weight for kind in layer.adapter_layer_names[:2])
    size, most = min(settings.r, *rows.shape), min(rows.shape)
    devices = [rows.device] if rows.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        found = torch.svd_lowrank(rows, min(size + 8, most), niter=4)
    # Another library or card may have other last bits, and directions.
    u, s, v = (x.to(rows.device) for x in from_first([x.cpu() for x in found], processes))
    # A direction of which there is nothing has an `A` too: it can train.
    lengths = a.flatten(1)[:size].norm(dim=1)
    a.flatten(1)[:size] = v.t()[:size] * lengths.unsqueeze(1)
    b.flatten(1)[:, :size] = u[:, :size] * (s[:size] / lengths / settings.scaling)
    layer.start_adapter(adapter)
    weight = _exact_weight(layer)
    now = weight + layer.summed_delta(weight, [adapter])
    return MergedLayer(name, True, relative_norm(now - target, delta), rounding)


@torch.no_grad()
def prune_states(
    optimizers: Iterable[Optimizer], params: Iterable[nn.Parameter], share: float
) -> None:
    """Zeroes a ``share`` of what optimizers keep of ``params``, that of least first moments.

    The same entries in each tensor: Adam divides the first moment by the root of the second, and a
    step would be out of bounds where the one is kept and the other zeroed. All of what is kept of a
    parameter goes, and begins again, where ``share`` is one or where that is more than moments of
    its shape: 8-bit states, or copies of weights, as those of schedule-free optimizers.
    """
    chosen = list(params)
    for optimizer in optimizers:
        for param in chosen:
            state = optimizer.state.get(param)
            if not state:
                continue
            # Others count steps.
            held = {key: x for key, x in state.items() if isinstance(x, Tensor) and x.ndim}
            moments = all(
                _MOMENTS.fullmatch(key) and x.shape == param.shape and x.is_floating_point()
                for key, x in held.items()
            )
            if isinstance(optimizer, torch.optim.Adagrad) and share == 1:
                # It makes its sums when it is made itself.
                state["step"].zero_()
                state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
                continue
            if share == 1 or not moments:
                optimizer.state.pop(param)
                continue
            count = int(share * param.numel())
            if held and count:
                first = [x for key, x in held.items() if key in _FIRST_MOMENTS]
                size = [*first, *held.values()][0].abs()
                kept = size > size.flatten().kthvalue(count).values
                for tensor in held.values():
                    tensor.mul_(kept)

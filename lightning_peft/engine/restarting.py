"""ReLoRA, after Lialin et al. 2023 (arXiv 2307.05695): merge adapters and restart them.

The sum of many low-rank changes has a higher rank than one. The merged weights are a part of
checkpoints and folders from then on, since no one can load them again.
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
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.mergeable import base_parameters, check_mergeable
from lightning_peft.engine.merging import MergeReport, merge
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
    if isinstance(layer, QuantizedLayer):
        return (
            "its weight is quantized. The sum would be quantized again each time, and most of what "
            "an adapter learnt is smaller than a step between codes. Use LoRAStrategy"
        )
    return None


def merge_and_restart(module: nn.Module, seed: int) -> MergeReport:
    """Merges the adapters of ``module`` into its dense weights, and gives them first values again.

    Args:
        module: A module that :func:`check_restartable` passed.
        seed: Of the first values; the same numbers on any device and in any process.

    Returns:
        The measured error of every layer.
    """
    report = merge(module)
    draw = torch.Generator().manual_seed(seed)
    for entry, part in adapted_parts(module):
        merged = []
        for name, layer in adapted_layers(part).items():
            layer.merged_adapters = ()
            for adapter in layer.adapter_settings:
                _begin_again(layer, adapter, entry.adapters[adapter].config, draw)
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
    layer.start_adapter(name)


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

"""CorDA and LoRA-GA: adapters made from batches, whose first product is taken off the base.

CorDA (Yang et al. 2024, arXiv 2406.05223) takes singular vectors of a weight times the covariance
of its inputs, LoRA-GA (Wang et al. 2024, arXiv 2407.05000) those of the gradient of a weight. PEFT
computes the factors; here it gets the covariance or the gradient from layers with adapters.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lightning_peft.compat.peft import CordaEigens, Linear, collect_eigens_for_layer
from lightning_peft.engine.adapters import adapter_file_tensors
from lightning_peft.engine.batches import Batches, layer_rows, token_mask
from lightning_peft.engine.fingerprint import stored_fingerprint
from lightning_peft.engine.gathering import from_first, gathered
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.methods.lora_config import alpha_of, rank_of
from lightning_peft.engine.record import AdaptedModuleRecord, AdapterInfo
from lightning_peft.errors import ConfigError, UnsupportedError, itemize

# PEFT advises 128 tokens for each input of a layer.
_TOKENS_PER_INPUT = 128
# Of whose gradients LoRA-GA takes the mean.
_GRADIENT_BATCHES = 8

_END: Any = object()


def _agreed(batches: Batches, is_enough: Callable[[int], bool]) -> Iterator[Any]:
    """Batches, until the first process has enough or one has no more: as many in each."""
    own, count = iter(batches.make()), 0
    while not from_first(is_enough(count), batches.processes):
        batch = next(own, _END)
        if not all(gathered(batch is not _END, batches.processes)):
            return
        count += 1
        yield batch


def _covariances(
    layers: Mapping[str, nn.Module], batches: Batches
) -> tuple[dict[str, Tensor], int]:
    """The means of ``x^T x`` of what layers get, as PEFT takes them; and how many batches ran."""
    sums: dict[str, Tensor] = {}
    calls, tokens = Counter[str](), Counter[str]()
    kept: list[Tensor | None] = [None]

    def add(name: str, _: nn.Module, inputs: Any) -> None:
        x = layer_rows(inputs, kept[0]).float()
        if len(x):
            sums.setdefault(name, x.new_zeros(x.shape[1], x.shape[1]))
            if not x.any():
                return
            # PEFT's, and where it is zero, what is never zero.
            x = x / (x.max().abs() or x.abs().max())
            sums[name].addmm_(x.t(), x)
            calls[name] += 1
            tokens[name] += len(x)

    def is_enough(_: int) -> bool:
        enough = [tokens[name] >= _TOKENS_PER_INPUT * len(x) for name, x in sums.items()]
        return len(sums) == len(layers) and all(enough)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    count = 0
    try:
        for batch in _agreed(batches, is_enough):
            kept[0] = token_mask(batch)
            with torch.no_grad():
                batches.run(batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.div_(max(1, calls[name])) for name, total in sums.items()}, count


def _gradients(layers: Mapping[str, nn.Module], batches: Batches) -> tuple[dict[str, Tensor], int]:
    """The mean gradients of the weights of ``layers``, as rows; and how many batches ran."""
    weights = {name: stored_parameter(layer) for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    count = 0
    for batch in _agreed(batches, lambda drawn: drawn == _GRADIENT_BATCHES):
        loss = batches.run(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            kind = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else "no tensor"
            raise ConfigError(
                f"init_lora_weights='lora_ga': the loss of a batch is {type(loss).__name__}, "
                f"{kind}. `step` or the training_step has to return one number with a gradient."
            )
        loss.backward()
        count += 1
    found = {
        n: as_rows(layers[n], w.grad) / count for n, w in weights.items() if w.grad is not None
    }
    return found, count


def _factors_from_batches(
    layers: Mapping[str, nn.Module], config: LoraConfig, batches: Batches
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """``A`` and ``B`` of each layer, those of the first process, and how many batches ran.

    Args:
        layers: Linear layers with dense weights, by name, whose adapters are switched off.
        config: With ``init_lora_weights`` ``"corda"`` or ``"lora_ga"``.
        batches: The batches.

    Raises:
        ConfigError: If there are no batches, or no loss.
        UnsupportedError: If a layer is not called, or a decomposition has no numbers; in all
            processes, where it is so in one.
    """
    init, processes = config.init_lora_weights, batches.processes
    found, count = (_covariances if init == "corda" else _gradients)(layers, batches)
    if not count:
        raise ConfigError(
            f"init_lora_weights={init!r}: the training data has no batches"
            + (" in one of the processes." if processes > 1 else ".")
        )
    problems = [
        f"{name}: a training step does not call it" for name in layers.keys() - found.keys()
    ]
    problems += [
        f"{n}: not all numbers are finite" for n, x in found.items() if not x.isfinite().all()
    ]
    if init == "corda":
        problems += [f"{n}: it gets only zeros" for n, x in found.items() if not x.any()]
    problems = sorted({one for some in gathered(problems, processes) for one in some})
    if problems:
        raise UnsupportedError(
            f"PEFT cannot initialise the adapters by init_lora_weights={init!r}:"
            + itemize(problems, 5)
            + "\nLeave these layers out by `exclude_modules`."
        )
    made = {}
    with torch.random.fork_rng():
        # PEFT draws directions for the decomposition of gradients.
        torch.manual_seed(0)
        for name, layer in layers.items():
            made[name] = _factors(layer, name, config, found[name])
    return from_first(made, processes), count


def _factors(layer: Any, name: str, config: Any, data: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` as PEFT's layer makes them from a covariance or gradient."""
    weight = as_rows(layer, stored_parameter(layer).detach())
    plain: Any = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    config, rank = copy.copy(config), rank_of(config, name)
    config.use_dora = config.fan_in_fan_out = False
    if config.init_lora_weights == "corda":
        plain.covariance_matrix = data
        whole = collect_eigens_for_layer(plain, config)
        first = config.corda_config.corda_method == "ipm"
        cut = slice(rank) if first else slice(len(whole.S_WC) - rank, None)
        u, v = (x[:, cut].to(weight.device) for x in (whole.U_WC, whole.V_WC))
        plain.eigens = CordaEigens(S_WC=whole.S_WC[cut].clone(), U_WC=u, V_WC=v)
    else:
        plain._peft_loraga_grad = data
    alpha: Any = alpha_of(config, name)
    made = Linear(plain, "default", config, r=rank, lora_alpha=alpha)
    a, b = (getattr(made, kind)["default"].weight.detach() for kind in ("lora_A", "lora_B"))
    return a.float().cpu(), b.float().cpu()


def start_residual(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, config: Any, batches: Batches
) -> Callable[[], str]:
    """Runs the batches; returns a function that changes adapter and base, and reports how."""
    layers = {target: part.get_submodule(target) for target in entry.adapters[name].targets}
    factors, count = _factors_from_batches(layers, config, batches)

    def finish() -> str:
        _take_off(part, entry, name, factors)
        return f"{config.init_lora_weights}: {count} batches; {len(layers)} layers"

    return finish


@torch.no_grad()
def _take_off(
    part: nn.Module,
    entry: AdaptedModuleRecord,
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Gives the adapter ``name`` its factors, and takes their product off the base.

    A resumed run does it again, maybe on another device, and has to get the same numbers: products
    of float32 are exact in float64, and are added one after the other.
    """
    info = entry.adapters[name]
    for target, values in factors.items():
        layer: Any = part.get_submodule(target)
        for kind, value in zip(("lora_A", "lora_B"), values, strict=True):
            getattr(layer, kind)[name].weight.copy_(value)
        a, b = (factor.double() for factor in layer.factors(name))
        product = a.new_zeros(len(b), a.shape[1])
        for row, column in zip(a, b.t(), strict=True):
            product.add_(column.unsqueeze(1) * row)
        product.mul_(layer.adapter_settings[name].scaling)
        weight = stored_parameter(layer)
        # Not in place: `restored_on_error` keeps the tensor that was there.
        weight.data = (weight.double() - from_rows(layer, product)).to(weight.dtype)
        layer.start_adapter(name)
    made = adapter_file_tensors(part, info.targets, name)
    info.initial = {key: tensor.detach().cpu().clone() for key, tensor in made.items()}
    info.needs_data = False
    entry.changed_base = stored_fingerprint(part, entry.base.names)


def restore_residual(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, initial: Mapping[str, Tensor]
) -> None:
    """Takes the factors that a checkpoint has off the base."""
    kinds = ("lora_A", "lora_B")
    factors = {
        target: tuple(initial[f"{target}.{kind}.weight"] for kind in kinds)
        for target in entry.adapters[name].targets
    }
    _take_off(part, entry, name, factors)  # type: ignore[arg-type]


def recorded_initial(info: AdapterInfo) -> dict[str, Tensor]:
    """The first factors, where only batches could make them again; else nothing."""
    return info.initial if info.config.get("init_lora_weights") in ("corda", "lora_ga") else {}

"""EVA, after Paischer et al. 2024 (arXiv 2410.07170): initialization from training data.

PEFT computes the principal directions of what each layer gets, by incremental SVD over batches.
Here they become ``A`` of adapters that are on the layers already, whose ranks are moved to where
the directions explain most. ``B`` stays zero, so the output does not change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lightning_peft.compat.peft import get_eva_state_dict
from lightning_peft.engine.adapters import disable_adapters
from lightning_peft.engine.batch_inits import (
    factors_from_batches,
    restore_residual,
    start_residual,
)
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.gathering import from_first
from lightning_peft.engine.layers.adapter import detach
from lightning_peft.engine.methods.lora_config import alpha_of, needs_data, rank_of
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.peft_wrappers import find_peft_wrapped
from lightning_peft.engine.record import AdaptedModuleRecord, AdapterInfo, adapted_parts
from lightning_peft.engine.rollback import restored_on_error
from lightning_peft.engine.verification.probe import preserved_state
from lightning_peft.errors import ConfigError, UnsupportedError

# Several times what convergence usually takes.
_MOST_BATCHES = 300


def lacks_data(module: nn.Module) -> bool:
    """Whether an adapter on ``module`` is to be initialised from batches and is not yet."""
    return any(i.needs_data for e, _ in adapted_parts(module) for i in e.adapters.values())


def initialize_from_batches(
    module: nn.Module,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Any], Any],
    processes: int = 1,
) -> list[str]:
    """Initialises the adapters that ask for it, and changes nothing else of ``module``.

    Args:
        module: A module with adapters, on the device of the batches.
        batches: Returns the batches from the first; called again where more are needed.
        run: Returns the loss of the module on one batch, with gradients where they are enabled.
        processes: How many processes do this, each on as many batches of its own.

    Returns:
        A sentence for each adapted part.

    Raises:
        ConfigError: If there are no batches, or too few tokens in them.
        UnsupportedError: If PEFT cannot compute the directions of a layer.
    """
    sentences = []
    for entry, part in adapted_parts(module):
        for name, info in entry.adapters.items():
            if not info.needs_data:
                continue
            config: Any = config_from_dict(info.config)
            start = _start_eva if config.init_lora_weights == "eva" else _start_residual
            with preserved_state(module), disable_adapters(module):
                module.eval()
                # Nothing is added to gradients that are there, which come back.
                for param in module.parameters():
                    param.grad = None
                finish = start(part, entry, name, config, batches, run, processes)
            with restored_on_error([part]):
                sentences.append(f"{finish()} of {entry.name or 'the module'}")
            info.needs_data = False
    return sentences


def _start_eva(
    part: nn.Module,
    entry: AdaptedModuleRecord,
    name: str,
    config: Any,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Any], Any],
    processes: int,
) -> Callable[[], str]:
    info, drawn = entry.adapters[name], _Batches(batches, config)
    found = _directions(part, info, config, drawn, torch.no_grad()(run), processes > 1)
    directions = from_first({key: value.cpu() for key, value in found.items()}, processes)

    def finish() -> str:
        apply_ranks(part, info, name, _changed_config(info, config, directions))
        for target in info.targets:
            layer: Any = part.get_submodule(target)
            layer.lora_A[name].weight.data.copy_(directions[target])
        ranks = [len(directions[target]) for target in info.targets]
        return (
            f"EVA: {drawn.count} batches; ranks {min(ranks)} to {max(ranks)} on {len(ranks)} of "
            f"{len(directions)} layers"
        )

    return finish


def _start_residual(
    part: nn.Module,
    entry: AdaptedModuleRecord,
    name: str,
    config: Any,
    batches: Callable[[], Iterable[Any]],
    run: Callable[[Any], Any],
    processes: int,
) -> Callable[[], str]:
    layers = {target: part.get_submodule(target) for target in entry.adapters[name].targets}
    factors, count = factors_from_batches(layers, config, batches, run, _rows, _mask, processes)

    def finish() -> str:
        start_residual(part, entry, name, factors)
        return f"{config.init_lora_weights}: {count} batches; {len(layers)} layers"

    return finish


def check_batches(
    module: nn.Module, config: PeftConfig, batches: Iterable[Any] | None, step: Any
) -> None:
    """Whether ``inject`` has the batches that a config needs, and no others.

    Raises:
        ConfigError: If it has some that nothing is made from, or no way to a loss.
        UnsupportedError: If the config needs a Trainer.
    """
    why = method_of(config).reason_for_trainer(config)
    if why is not None and (batches is None or not needs_data(config)):
        raise UnsupportedError(
            f"{type(config).__name__} by inject: {why}. Give the config to LoRAStrategy, "
            "QLoRAStrategy or one of the callbacks as `peft_config`"
            + (", or pass `batches`." if needs_data(config) else ".")
        )
    init = getattr(config, "init_lora_weights", None)
    if batches is not None and not needs_data(config):
        raise ConfigError(f"inject with batches: nothing is made from them by {init!r}.")
    if batches is not None and find_peft_wrapped(module, ()):
        raise ConfigError(
            "inject with batches: get_peft_model put the adapters into the module already, and "
            "they keep their values. Give inject the model without get_peft_model, or no batches."
        )
    if init == "lora_ga" and step is None and not hasattr(module, "training_step"):
        raise ConfigError(
            f"init_lora_weights='lora_ga': {type(module).__name__} has no training_step. Pass "
            "`step`, a function of the module and a batch that returns the loss."
        )


class _Batches:
    """Batches for PEFT, which draws them until all directions have converged."""

    def __init__(self, make: Callable[[], Iterable[Any]], config: Any) -> None:
        self._make, self._config = make, config
        self.count = 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        # Without an end: PEFT would begin again by itself, and for ever.
        while True:
            before = self.count
            for batch in self._make():
                self.count += 1
                if self.count > _MOST_BATCHES:
                    raise self._error()
                yield batch
            if self.count == before:
                raise ConfigError("init_lora_weights='eva': the training data has no batches.")

    def _error(self) -> ConfigError:
        needed = self._config.r * self._config.eva_config.rho
        return ConfigError(
            f"init_lora_weights='eva': no convergence in {_MOST_BATCHES} batches. Each needs at "
            f"least r * rho = {needed:g} tokens that are trained on: use a larger batch_size, a "
            "lower r or rho, or a lower tau in eva_config."
        )


def _directions(
    part: nn.Module,
    info: AdapterInfo,
    config: Any,
    batches: Any,
    run: Callable[[Any], Any],
    gather: bool,
) -> dict[str, Tensor]:
    exact = copy.deepcopy(config)
    exact.target_modules = "|".join(map(re.escape, info.targets))
    exact.exclude_modules = exact.layers_to_transform = exact.layers_pattern = None
    try:
        found: dict[str, Tensor] = get_eva_state_dict(
            part,
            batches,
            exact,
            forward_fn=lambda _, batch: run(batch),
            prepare_model_inputs_fn=_trained_mask,
            prepare_layer_inputs_fn=_rows,
            gather_distributed_inputs=gather,
            show_progress_bar=False,
        )
    except ConfigError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        raise UnsupportedError(
            f"PEFT cannot initialise the adapters by EVA ({error}). Every adapted layer has to be "
            "called, with its input in front, in a training step: leave others out by "
            "`exclude_modules`, or use another init_lora_weights."
        ) from error
    return found


def _mask(batch: Any) -> Tensor | None:
    """Which tokens are attended to, ``(rows, tokens)``; ``None`` where a batch has no tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask
    return mask.bool()


def _trained_mask(batch: Any, config: Any) -> Tensor | None:
    """The same, and by default those that are trained on alone."""
    kept, settings = _mask(batch), config.eva_config
    if kept is None or not settings.use_label_mask:
        return kept
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == kept.shape:
        kept = kept & (labels != settings.label_mask_value)
    return kept


def _rows(inputs: Any, mask: Tensor | None, name: str) -> Tensor:
    x: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def _changed_config(
    info: AdapterInfo, config: Any, directions: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The config with the ranks and alphas that the directions got, as PEFT changes its own."""
    ranks, alphas, targets = {}, {}, []
    for target in info.targets:
        r, alpha, new = rank_of(config, target), alpha_of(config, target), len(directions[target])
        if not new:
            continue
        targets.append(target)
        if new != r and config.eva_config.adjust_scaling_factors:
            alpha *= new / r
        if new != config.r:
            ranks[target] = new
        if alpha != config.lora_alpha:
            alphas[target] = alpha
    changed = {**info.config, "rank_pattern": ranks, "alpha_pattern": alphas}
    if len(targets) < len(info.targets):
        changed["target_modules"] = targets
    return changed


def apply_ranks(part: nn.Module, info: AdapterInfo, name: str, fields: Mapping[str, Any]) -> None:
    """Gives the layers of an adapter the ranks of a config, and takes it off the others.

    Their factors are new: ``B`` is zero, and ``A`` has no values yet.
    """
    config, kept = config_from_dict(fields), set(info.targets)
    if fields["target_modules"] != info.config["target_modules"]:
        kept &= {*fields["target_modules"]}
    for target in info.targets:
        layer: Any = part.get_submodule(target)
        if target in kept:
            _resize(layer, name, rank_of(config, target), alpha_of(config, target), config)
        elif len(layer.adapter_settings) == 1:
            detach(layer)
        else:
            for kind in (*layer.adapter_layer_names, *layer.adapter_module_names):
                del getattr(layer, kind)[name]
            del layer.adapter_settings[name]
    info.targets = [target for target in info.targets if target in kept]
    info.config = dict(fields)


def _resize(layer: Any, name: str, rank: int, alpha: float, config: Any) -> None:
    settings = layer.adapter_settings[name]
    a, b = layer.lora_A[name], layer.lora_B[name]
    for holder, old, wide, high in (
        (layer.lora_A, a, a.in_features, rank),
        (layer.lora_B, b, rank, b.out_features),
    ):
        where = {"device": old.weight.device, "dtype": old.weight.dtype}
        made = nn.Linear(wide, high, bias=False, **where)
        nn.init.zeros_(made.weight)
        made.weight.requires_grad_(old.weight.requires_grad)
        holder[name] = made.train(old.training)
    settings.r, settings.alpha = rank, alpha
    settings.scaling = alpha / (rank**0.5 if config.use_rslora else rank)


def restore_from_batches(module: nn.Module, described: Mapping[str, Any]) -> None:
    """Gives adapters the ranks, and the base the changes, of a checkpoint before it is loaded."""
    for entry, part in adapted_parts(module):
        saved = described["parts"].get(entry.name, {"adapters": {}})["adapters"]
        for name, info in entry.adapters.items():
            fields = saved.get(name, {}).get("config", {})
            same = fields.get("init_lora_weights") == info.config.get("init_lora_weights")
            # A checkpoint from before the first batch has no values.
            if not (info.needs_data and same) or saved[name].get("needs_data"):
                continue
            if fields["init_lora_weights"] != "eva":
                restore_residual(part, entry, name, saved[name]["initial"])
                continue
            # The rest of the config is compared afterwards.
            names = ("rank_pattern", "alpha_pattern", "target_modules")
            changed = {key: fields[key] for key in names}
            if {*saved[name]["targets"]} == {*info.targets}:
                changed["target_modules"] = info.config["target_modules"]
            apply_ranks(part, info, name, {**info.config, **changed})
            info.needs_data = False

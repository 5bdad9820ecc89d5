"""EVA, after Paischer et al. 2024 (arXiv 2410.07170): initialization from training data.

PEFT computes the principal directions of what each layer gets, by incremental SVD over batches.
Here they become ``A`` of adapters that are on the layers already, whose ranks are moved to where
the directions explain most. ``B`` stays zero, so the output does not change.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.peft import get_eva_state_dict
from lightning_peft.engine.batches import Batches, layer_rows, token_mask
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.gathering import from_first
from lightning_peft.engine.layers.adapter import detach
from lightning_peft.engine.methods.lora_config import alpha_of, rank_of
from lightning_peft.engine.record import AdaptedModuleRecord, AdapterInfo
from lightning_peft.errors import ConfigError, UnsupportedError

# Several times what convergence usually takes.
_MOST_BATCHES = 300


def start_eva(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, config: Any, batches: Batches
) -> Callable[[], str]:
    """Runs the batches; returns a function that changes the adapter ``name`` and reports how.

    Raises:
        ConfigError: If there are no batches, or too few tokens in them.
        UnsupportedError: If PEFT cannot compute the directions of a layer.
    """
    info, drawn = entry.adapters[name], _Drawn(batches, config)
    found = _directions(part, info, config, drawn)
    directions = from_first({key: value.cpu() for key, value in found.items()}, batches.processes)

    def finish() -> str:
        apply_ranks(part, info, name, _changed_config(info, config, directions))
        for target in info.targets:
            layer: Any = part.get_submodule(target)
            layer.lora_A[name].weight.data.copy_(directions[target])
        info.needs_data = False
        ranks = [len(directions[target]) for target in info.targets]
        return (
            f"EVA: {drawn.count} batches; ranks {min(ranks)} to {max(ranks)} on {len(ranks)} of "
            f"{len(directions)} layers"
        )

    return finish


class _Drawn:
    """Batches for PEFT, which draws them until all directions have converged."""

    def __init__(self, batches: Batches, config: Any) -> None:
        self.batches, self._config = batches, config
        self.count = 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        # Without an end: PEFT would begin again by itself, and for ever.
        while True:
            before = self.count
            for batch in self.batches.make():
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
    part: nn.Module, info: AdapterInfo, config: Any, drawn: _Drawn
) -> dict[str, Tensor]:
    run = torch.no_grad()(drawn.batches.run)
    exact = copy.deepcopy(config)
    exact.target_modules = "|".join(map(re.escape, info.targets))
    exact.exclude_modules = exact.layers_to_transform = exact.layers_pattern = None
    try:
        found: dict[str, Tensor] = get_eva_state_dict(
            part,
            drawn,
            exact,
            forward_fn=lambda _, batch: run(batch),
            prepare_model_inputs_fn=_trained_mask,
            prepare_layer_inputs_fn=lambda inputs, mask, _: layer_rows(inputs, mask),
            gather_distributed_inputs=drawn.batches.processes > 1,
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


def _trained_mask(batch: Any, config: Any) -> Tensor | None:
    """Which tokens are attended to, and by default trained on."""
    kept, settings = token_mask(batch), config.eva_config
    if kept is None or not settings.use_label_mask:
        return kept
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == kept.shape:
        kept = kept & (labels != settings.label_mask_value)
    return kept


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


def restore_eva(part: nn.Module, info: AdapterInfo, name: str, saved: Mapping[str, Any]) -> None:
    """Gives an adapter the ranks that it has in the description of a checkpoint."""
    # The rest of the config is compared afterwards.
    changed = {
        key: saved["config"][key] for key in ("rank_pattern", "alpha_pattern", "target_modules")
    }
    if {*saved["targets"]} == {*info.targets}:
        changed["target_modules"] = info.config["target_modules"]
    apply_ranks(part, info, name, {**info.config, **changed})
    info.needs_data = False

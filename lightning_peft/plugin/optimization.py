"""Optimizer replacement and activation checkpointing of a run."""

from __future__ import annotations

import logging
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_peft import engine
from lightning_peft.compat.lightning import is_compiled, is_mock_optimizer
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import namespace_of

log = logging.getLogger(__name__)


def real_optimizers(strategy: Any) -> list[Any]:
    """Returns the optimizers of ``strategy`` without Lightning's stand-in for none."""
    return [o for o in strategy.optimizers if not is_mock_optimizer(o)]


def add_adapters_to_optimizers(strategy: Any) -> list[Any]:
    """Puts the adapters into optimizers that are older than they are, and logs it.

    Returns the optimizers that are to train the module: those of the strategy, or where it has
    none, those that the module keeps as attributes, to step them itself.
    """
    module = strategy.lightning_module
    real = real_optimizers(strategy)
    known = {id(optimizer) for optimizer in real}
    own = [optimizer for optimizer in engine.optimizers_of(module) if id(optimizer) not in known]
    notes = engine.add_adapters_to_optimizers(module, real or own, own if real else ())
    if notes:
        log_info(strategy, f"{'; '.join(notes)}.")
    return real or own


def optimized_parameter_ids(strategy: Any) -> set[int]:
    """Returns the ids of what the optimizers of ``strategy`` hold, or those of its module do."""
    own = [*real_optimizers(strategy), *engine.optimizers_of(strategy.lightning_module)]
    return engine.held_ids(own)


def freeze_unoptimized(strategy: Any, held: set[int]) -> None:
    """Freezes the adapters of layers that ``configure_optimizers`` left out, and warns of it.

    ``held`` has the ids of what optimizers hold, and of what they held before.
    """
    # Several processes have agreed on what has gradients by then.
    alone = strategy.world_size == 1
    unoptimized = engine.freeze_unoptimized(strategy.lightning_module, held, freeze=alone)
    if unoptimized and strategy.is_global_zero:
        log.warning(
            "No optimizer holds anything of %d adapted layers: %s%s. configure_optimizers lists "
            "other submodules, so the adapters of these keep what they have and do not train in "
            "this fit. Name them in exclude_modules if they are never to train.",
            len(unoptimized),
            ", ".join(unoptimized[:5]),
            f" and {len(unoptimized) - 5} more" if len(unoptimized) > 5 else "",
        )


def replace_optimizers(strategy: Any, name: str | None) -> None:
    """Replaces the optimizers of ``strategy`` in place, and says so in one line."""
    optimizers = real_optimizers(strategy)
    if name is None or not optimizers:
        return
    module = strategy.lightning_module
    params = dict(module.named_parameters(remove_duplicate=False))
    record = engine.require_record(module)
    # Those that adapters were merged into are in files, and train no more than the others.
    merged = {part.qualified(name) for part in record.parts.values() for name in part.replaced}
    merged = {name for name in merged & params.keys() if not params[name].requires_grad}
    frozen = {id(params[name]) for name in record.frozen | merged}
    notes = engine.replace_optimizers(optimizers, name, frozen)
    # Lightning's wrappers are made for a class, and these have another one now.
    strategy.optimizers = strategy.optimizers
    if notes:
        log_info(strategy, f"optimizer={name!r}: {'; '.join(notes)}.")


def scale_b_rates(strategy: Any, ratio: float | None) -> None:
    """Gives the factors ``B`` their learning rate of LoRA+."""
    if ratio is not None:
        own = real_optimizers(strategy) or engine.optimizers_of(strategy.lightning_module)
        count = engine.scale_b_rates(strategy.lightning_module, own, ratio)
        log_info(strategy, f"lora_plus_lr_ratio={ratio:g}: {count} factors B train {ratio:g}-fold.")


def rank_budget(strategy: Any) -> engine.RankBudget | None:
    """Returns the budget of AdaLoRA, for as many steps as the config or the Trainer says."""
    module = strategy.lightning_module
    configured = getattr(strategy.lifecycle.injection.peft_config, "total_step", None)
    budget = engine.rank_budget(
        module, lambda: configured or module.trainer.estimated_stepping_batches
    )
    wrapped = strategy.model
    searches = isinstance(wrapped, DistributedDataParallel) and wrapped.find_unused_parameters
    if searches and budget is not None and budget.has_penalty:
        raise ConfigError(
            "find_unused_parameters=True with AdaLoRA: DDP looks for unused parameters in the "
            "output of the step, and the penalty on the loss comes after that. Set "
            "`orth_reg_weight` to 0 for no penalty, or leave find_unused_parameters out."
        )
    return budget


def float32_advice(module: Any, device: torch.device, precision: Any) -> str | None:
    """Returns a hint where a GPU computes the products of 4-bit weights in float32, else ``None``.

    Tensor cores then have no part in them.
    """
    if device.type == "cpu" or precision != "32-true":
        return None
    slow = engine.float32_products(module)
    if not slow:
        return None
    old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    faster = "16-mixed" if old else "bf16-mixed"
    return (
        f"precision='32-true': the products of {slow} quantized layers are computed in "
        f"float32, without the GPU's tensor cores. Trainer(precision={faster!r}) uses "
        "them; bnb_4bit_compute_dtype='float32' says that this is what you want."
    )


def enable_activation_checkpointing(strategy: Any, setting: bool | float | str) -> bool:
    """Switches activation checkpointing on for a fit, and says where.

    Returns whether it is open yet: with ``"auto"`` there must be a batch to decide with. Until then
    everything is kept.
    """
    disable_activation_checkpointing(strategy)
    module = strategy.lightning_module
    if setting is False or module.trainer.state.fn != "fit":
        return False
    if setting == "auto" and is_compiled(module):
        log_info(strategy, "gradient_checkpointing='auto': off, since the module is compiled.")
        return False
    active = engine.checkpoint_activations(module, setting, partial(log_info, strategy))
    strategy._checkpointing = active
    # Predictions are for whole weights. Where they do not fit, memory is scarce.
    if setting == "auto" and not strategy.shards_base and (active.blocks or active.attributes):
        active.keep_all()
        return True
    if active.descriptions:
        where = "; ".join(active.descriptions)
        log_info(strategy, f"gradient_checkpointing={setting!r}: {where}.")
    return False


def disable_activation_checkpointing(strategy: Any) -> None:
    """Switches activation checkpointing off again, if it is on."""
    active, strategy._checkpointing = strategy._checkpointing, None
    if active is not None:
        active.disable()


def log_info(strategy: Any, message: str) -> None:
    """Shows ``message`` once, the way Lightning tells which device it uses."""
    rank_zero: Any = import_module(f"{namespace_of(strategy)}.utilities.rank_zero")
    rank_zero.rank_zero_info(message)

"""Optimizers of bitsandbytes in place of those that ``configure_optimizers`` returned."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_peft import engine
from lightning_peft.plugin.namespace import root_of


def replace_optimizers(strategy: Any, name: str | None) -> None:
    """Replaces the optimizers of ``strategy`` in place, and says so in one line.

    Args:
        strategy: A strategy whose ``setup_optimizers`` has just run.
        name: The ``optimizer`` argument; ``None`` changes nothing.

    Raises:
        ConfigError: If an optimizer asked for by name cannot stand in.
    """
    # Lightning's stand-in where configure_optimizers returned None.
    optimizers = [o for o in strategy.optimizers if type(o).__name__ != "_MockOptimizer"]
    if name is None or not optimizers:
        return
    module = strategy.lightning_module
    params = dict(module.named_parameters(remove_duplicate=False))
    frozen = {id(params[name]) for name in engine.require_record(module).frozen}
    told = engine.replace_optimizers(optimizers, name, frozen)
    # Lightning's wrappers are made for a class, and these have another one now.
    strategy.optimizers = strategy.optimizers
    if told:
        say(strategy, f"optimizer={name!r}: {'; '.join(told)}.")


def say(strategy: Any, message: str) -> None:
    """Shows ``message`` once, the way Lightning tells which device it uses."""
    rank_zero: Any = import_module(f"{root_of(strategy)}.utilities.rank_zero")
    rank_zero.rank_zero_info(message)

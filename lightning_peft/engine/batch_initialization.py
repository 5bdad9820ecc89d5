"""Initialization of adapters from training batches: EVA, CorDA and LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.engine.adapters import disable_adapters
from lightning_peft.engine.batches import Batches
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.eva import restore_eva, start_eva
from lightning_peft.engine.methods.lora_config import needs_data
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.peft_wrappers import find_peft_wrapped
from lightning_peft.engine.record import adapted_parts
from lightning_peft.engine.residual_inits import restore_residual, start_residual
from lightning_peft.engine.rollback import restored_on_error
from lightning_peft.engine.verification.probe import preserved_state
from lightning_peft.errors import ConfigError, UnsupportedError


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
            start = start_eva if config.init_lora_weights == "eva" else start_residual
            with preserved_state(module), disable_adapters(module):
                module.eval()
                # Nothing is added to gradients that are there, which come back.
                for param in module.parameters():
                    param.grad = None
                finish = start(part, entry, name, config, Batches(batches, run, processes))
            with restored_on_error([part]):
                sentences.append(f"{finish()} of {entry.name or 'the module'}")
    return sentences


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
            if fields["init_lora_weights"] == "eva":
                restore_eva(part, info, name, saved[name])
            else:
                restore_residual(part, entry, name, saved[name]["initial"])

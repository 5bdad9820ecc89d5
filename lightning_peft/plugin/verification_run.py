"""Verification of a LightningCLI config: complete setup without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.adapter_checks import PRUNING_CALLBACK, REFUSED_CALLBACKS
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.lightning_cli import STRICT, lightning_command, qualify_optimizers
from lightning_peft.plugin.namespace import namespace
from lightning_peft.plugin.training_checks import TrainingChecks, verify_in

# What would write, wait or draw; a verification does not.
_SETTINGS = {
    "devices": 1,
    "num_nodes": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "fast_dev_run": False,
    "profiler": None,
}
_ADAPTER_CALLBACKS = ("LoRACallback", "QLoRACallback")
_UNLIMITED = {"max_epochs": 1_000_000, "max_steps": -1, "max_time": None}


@dataclass(frozen=True)
class VerifiedConfig:
    """What a config was built to, and the verification of it."""

    module: str
    datamodule: Any
    verification: engine.Verification


class _VerificationDone(Exception):
    """Ends the run where the first step would begin."""


def verify_config(arguments: Sequence[str], announce: bool = True) -> VerifiedConfig:
    """Builds module, data and Trainer as LightningCLI does, and verifies on the first batch.

    On one device, and without loggers or callbacks besides those of this package. Callbacks that
    cannot be used with adapters stay, and are refused as in training.
    """
    with lightning_command(arguments) as root:
        cli = _build(root, arguments)
    lifecycle = _lifecycle_of(cli.trainer)
    lifecycle.announce = announce
    lifecycle.checks = TrainingChecks("cheap")
    # It would raise at the first problem; here all are wanted.
    lifecycle.checks.start = lambda strategy: None  # type: ignore[method-assign]
    results: list[engine.Verification] = []

    def verify_then_stop(strategy: Any, batch: Any) -> None:
        results.append(verify_in(strategy, batch))
        raise _VerificationDone

    lifecycle.checks.before_batch = verify_then_stop  # type: ignore[method-assign]
    ckpt_path = cli.config.get("ckpt_path")
    try:
        with namespace(root):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)
    except _VerificationDone:
        return VerifiedConfig(type(cli.model).__name__, cli.datamodule, results[0])
    raise ConfigError(
        "The training data gave no batch to verify with: it is empty, or `max_epochs`, `max_steps` "
        "or `limit_train_batches` leave nothing of it."
    )


def _build(root: str, arguments: Sequence[str]) -> Any:
    lightning_cli = import_module(f"{root}.cli").LightningCLI

    class VerifyCLI(lightning_cli):  # type: ignore[misc, valid-type]
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_argument("--ckpt_path", type=str | None, default=None)

        def before_instantiate_classes(self) -> None:
            settings = self.config["trainer"]
            # The checkpoint of a finished run leaves no batch.
            resumed = _UNLIMITED if self.config.get("ckpt_path") is not None else {}
            for name, value in {**_SETTINGS, **resumed}.items():
                settings[name] = value
            configured = settings["callbacks"] or []
            configured = configured if isinstance(configured, list) else [configured]
            settings["callbacks"] = [callback for callback in configured if _is_relevant(callback)]

    return VerifyCLI(
        args=qualify_optimizers(arguments),
        run=False,
        save_config_callback=None,
        parser_kwargs={"prog": "lightning-peft verify", **STRICT},
    )


def _is_relevant(callback: Any) -> bool:
    module, _, name = str(callback["class_path"]).rpartition(".")
    cls = getattr(import_module(module), name)
    names = {base.__name__ for base in cls.__mro__}
    return bool(names & {*REFUSED_CALLBACKS, PRUNING_CALLBACK, *_ADAPTER_CALLBACKS})


def _lifecycle_of(trainer: Any) -> Lifecycle:
    for owner in (trainer.strategy, *trainer.callbacks):
        lifecycle = getattr(owner, "lifecycle", None)
        if isinstance(lifecycle, Lifecycle):
            return lifecycle
    raise ConfigError(
        f"trainer.strategy is {type(trainer.strategy).__name__}, and there is no LoRACallback or "
        "QLoRACallback: no adapters were asked for. Use "
        "`strategy: {class_path: lightning_peft.QLoRAStrategy}`, or pass --trainer.strategy=qlora."
    )

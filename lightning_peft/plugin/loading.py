"""``load_from_checkpoint`` for checkpoints that hold adapters only."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.adapter_strategy import unguarded
from lightning_peft.plugin.checkpoint_io import KEY, AdapterCheckpointIO
from lightning_peft.plugin.namespace import ROOTS, realize, root_of

log = logging.getLogger(__name__)


def load_from_checkpoint(
    cls: Any,
    path: str | os.PathLike[str],
    *,
    map_location: torch.device | str | None = None,
    weights_only: bool | None = None,
    **hyperparameters: Any,
) -> Any:
    """Builds a LightningModule and puts the adapters of a checkpoint on it.

    The module is made as Lightning's ``load_from_checkpoint`` makes it, from the saved
    hyperparameters and ``configure_model`` (and ``setup``, where the layers are built there). Then
    the adapters are injected as the checkpoint describes, on a base that must be the same, and
    their values are loaded strictly.

    Args:
        cls: The LightningModule class.
        path: A ``.ckpt`` written under a strategy or callback of this package.
        map_location: Device of the module that is returned; by default the CPU.
        weights_only: ``False`` trusts the file to run code; by default nothing of it runs.
        **hyperparameters: Override, or supply, arguments of the constructor.

    Returns:
        The module, in eval mode.

    Raises:
        CheckpointError: If the file is damaged, unsafe, or does not fit.
        BaseMismatchError: If the module's base is not the one the adapters were trained on.
        ConfigError: If constructor arguments are missing.
    """
    root = next((r for c in cls.__mro__ for r in ROOTS if c.__module__.startswith(f"{r}.")), None)
    io = realize(AdapterCheckpointIO, root or ROOTS[0])()
    checkpoint = unguarded(io.load_checkpoint(path, "cpu", weights_only))
    if KEY not in checkpoint:
        raise CheckpointError(
            f"{str(path)!r} holds no adapters of lightning_peft. Load it with "
            f"{cls.__name__}.load_from_checkpoint."
        )
    described = checkpoint[KEY]
    module = _build(cls, checkpoint, hyperparameters, described.get("left_out", []))
    _build_layers(module, described)
    module.on_load_checkpoint(checkpoint)
    device = torch.device(map_location) if map_location is not None else None
    engine.inject_as_described(module, described, device)
    engine.load_trainable_state_dict(module, checkpoint["state_dict"])
    if device is not None:
        module.to(device)
    return module.eval()


def _build(cls: Any, checkpoint: dict[str, Any], given: dict[str, Any], left_out: list[str]) -> Any:
    saved = dict(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {})
    name = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    parameters = inspect.signature(cls.__init__).parameters
    if name and name in parameters and name not in ("kwargs", "args"):
        arguments = {name: saved, **given}
    else:
        arguments = {**saved, **given}
    arguments.pop("_instantiator", None)
    arguments.pop("_class_path", None)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    try:
        return cls(**arguments)
    except TypeError as error:
        missing = [key for key in left_out if key not in arguments]
        raise ConfigError(
            f"{cls.__name__} cannot be built from the checkpoint: {error}."
            + (
                f" Pass {', '.join(missing)} to load_from_checkpoint: objects are not stored."
                if missing
                else " Pass the missing arguments to load_from_checkpoint, or call "
                "save_hyperparameters() in the constructor."
            )
        ) from error


def _build_layers(module: Any, described: dict[str, Any]) -> None:
    from_user = root_of(module)
    if from_user is not None:
        module.configure_model()
    wanted = {
        f"{name}.{target}" if name else target
        for name, part in described["parts"].items()
        for adapter in part["adapters"].values()
        for target in adapter["targets"]
    }
    if not wanted <= dict(module.named_modules(remove_duplicate=False)).keys():
        # Lightning itself never calls `setup` here and would fail on such modules.
        log.info("layers are not there after configure_model; calling setup('fit')")
        module.setup("fit")

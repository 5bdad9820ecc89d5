"""``load_from_checkpoint`` for adapter-only checkpoints."""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_peft import engine
from lightning_peft.compat.lightning import CLASS_PATH, INSTANTIATOR
from lightning_peft.errors import CheckpointError, ConfigError, LightningPeftError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY, load_tensors, unpack_checkpoint
from lightning_peft.plugin.checkpoint_io import WholeFileCheckpointIO, read_checkpoint
from lightning_peft.plugin.namespace import (
    LateBoundMeta,
    bind_to_lightning,
    namespace_in_use,
    namespace_of_class,
)


def lightning_class(cls: Any) -> tuple[Any, str]:
    """Returns a LightningModule class, with its base where it is one of this package, and its root.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(cls, LateBoundMeta):
        cls = bind_to_lightning(cls, namespace_in_use())
    root = namespace_of_class(cls) if isinstance(cls, type) else None
    if root is None:
        raise ConfigError(f"{getattr(cls, '__name__', cls)} is not a LightningModule.")
    return cls, root


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
    cls, root = lightning_class(cls)
    io = bind_to_lightning(WholeFileCheckpointIO, root)()
    checkpoint = read_checkpoint(io.load_checkpoint, path, weights_only)
    if CHECKPOINT_KEY not in checkpoint:
        others = any("lora_" in str(key) for key in checkpoint.get("state_dict") or ())
        way = "Load it with {}.load_from_checkpoint."
        if others:
            way = "It has those of a plain Trainer or of PEFT: `lightning-peft import` converts it."
        raise CheckpointError(
            f"{str(path)!r} was not written with adapters of this package. "
            + way.format(cls.__name__)
        )
    described = checkpoint[CHECKPOINT_KEY]
    module = build_module(cls, root, checkpoint, hyperparameters)
    _build_layers(module, described)
    device = None if map_location is None else torch.device(map_location)
    engine.inject_as_described(module, described, device)
    checkpoint = unpack_checkpoint(module, checkpoint)
    module.on_load_checkpoint(checkpoint)
    load_tensors(module, checkpoint, module.strict_loading)
    return module.to(device or torch.device("cpu")).eval()


def build_module(cls: Any, root: str, checkpoint: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Makes the module from its hyperparameters, as Lightning does."""
    left_out = checkpoint.get(CHECKPOINT_KEY, {}).get("left_out", [])
    absent = [name for name in left_out if name not in overrides]
    if absent:
        # Also where the constructor has defaults: those need not be what was trained with.
        raise ConfigError(
            f"Pass {', '.join(absent)} to load_from_checkpoint: {cls.__name__} was made with "
            "objects there, which checkpoints do not hold."
        )
    arguments = dict(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {})
    parameters = inspect.signature(cls.__init__).parameters
    name = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)
    if name in parameters and name not in ("args", "kwargs"):
        arguments = {name: arguments}
    arguments |= overrides
    by_cli = arguments.pop(INSTANTIATOR, None) is not None
    if by_cli:
        return _instantiate(cls, root, arguments)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{cls.__name__} cannot be built from the checkpoint: {error}. Pass what is missing to "
            "load_from_checkpoint, or by --init to `lightning-peft import`, or call "
            "save_hyperparameters() in the constructor."
        ) from error


def _instantiate(cls: Any, root: str, arguments: dict[str, Any]) -> Any:
    """Makes a module that LightningCLI made, whose arguments are written as in its YAML."""
    path = arguments.get(CLASS_PATH)
    if path is not None:
        module, _, name = str(path).rpartition(".")
        # Looked up, not imported: a file must not choose which code runs.
        named = getattr(sys.modules.get(module), name, None)
        if not (isinstance(named, type) and issubclass(named, cls)):
            raise CheckpointError(
                f"The checkpoint requests the class {path!r}, which is not an imported subclass of "
                f"{cls.__name__}. Import it first if you trust the file."
            )
    return import_module(f"{root}.cli").instantiate_module(cls, arguments)


def _build_layers(module: Any, described: dict[str, Any]) -> None:
    """Builds what the constructor did not; Lightning itself stops after ``configure_model``."""
    module.configure_model()
    expected = {
        f"{name}.{target}".lstrip(".")
        for name, part in described["parts"].items()
        for adapter in part["adapters"].values()
        for target in adapter["targets"]
    }
    built = expected <= dict(module.named_modules(remove_duplicate=False)).keys()
    params = dict(module.named_parameters(remove_duplicate=False))
    tied = all(len({id(params.get(n)) for n in names}) == 1 for names in described.get("tied", ()))
    if built and tied and not any(is_lazy(param) for param in params.values()):
        return
    try:
        module.setup("fit")
    except LightningPeftError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{type(module).__name__} lacks layers, sizes or ties after configure_model, and "
            f"setup('fit') failed without a Trainer ({type(error).__name__}: {error}). Load it by "
            "trainer.validate(module, ckpt_path=...), or do that in the constructor or in "
            "configure_model."
        ) from error

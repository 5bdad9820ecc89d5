"""Conversion of other programs' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lightning_peft import engine
from lightning_peft.errors import CheckpointError, ConfigError, first_line
from lightning_peft.plugin.checkpoint_content import MODULE_KEY, pack_checkpoint, strip_objects
from lightning_peft.plugin.checkpoint_io import (
    adapter_folder,
    remove_adapter_folder,
    write_adapter_folder,
    write_whole_file,
)
from lightning_peft.plugin.foreign_optimizer import optimizer_states
from lightning_peft.plugin.lightning_cli import find_modules_here
from lightning_peft.plugin.loading import build_module, load_from_checkpoint
from lightning_peft.plugin.namespace import namespace_of_class


@dataclass
class Imported:
    """What became of a checkpoint.

    Attributes:
        output: The new file.
        adapter: The adapter folder next to it.
        loaded: What was loaded.
        optimizer: ``"restored"``, or why its state was left out.
    """

    output: Path
    adapter: Path
    loaded: engine.ForeignLoad
    optimizer: str = "not in the file"


def import_checkpoint(
    source: Path,
    class_path: str,
    output: Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
    use_rslora: bool = False,
    allow_unmapped: bool = False,
    adapt: str | None = None,
) -> Imported:
    """Brings a checkpoint over: adapters, heads, buffers, base weights that differ, optimizer.

    The module is built from the hyperparameters in the file and ``arguments``. The new file is
    loaded once before this returns. Nothing in the old file can run code.

    Args:
        source: A ``.ckpt``, a file with a state dict (safetensors too), or a PEFT folder.
        class_path: The LightningModule as ``"package.module:Class"``.
        output: The new ``.ckpt``; its adapter folder is in ``adapters`` next to it.
        arguments: Arguments of the constructor, over those in the file.
        lora_alpha: The scale of the adapters, for all or by submodule, where neither file nor
            module says it.
        use_rslora: Whether that scale was by the root of the rank, where the file lacks it.
        allow_unmapped: Leave out keys that the module has no place for.
        adapt: The submodule of a PEFT folder (default: the only pretrained part), or of the keys.

    Raises:
        CheckpointError: If the file is sharded, damaged, unsafe, or does not fit, or the module
            wraps its layers with another scale.
        ConfigError: If the class or its arguments are wrong, or ``output`` is there already.
    """
    if output.exists() or adapter_folder(output).exists():
        place = repr(str(output))
        raise ConfigError(f"The output {place} is there already. Remove it, or name another.")
    cls, root = _class_of(class_path)
    folder = source / "adapter_config.json"
    checkpoint = {"state_dict": {}} if folder.is_file() else _read(source)
    if "lightning_peft" in checkpoint:
        raise CheckpointError(f"{str(source)!r} is a checkpoint of this package already.")
    module = _built(cls, root, checkpoint, dict(arguments or {}))
    if folder.is_file():
        engine.load_adapter(module, source, adapt=adapt, is_trainable=True)
        loaded = _of_folder(module)
    else:
        start = f"{adapt}." if adapt else ""
        loaded = engine.load_foreign_state(
            module,
            {start + key: value for key, value in checkpoint["state_dict"].items()},
            lora_alpha=lora_alpha,
            use_rslora=use_rslora,
            hyperparameters=checkpoint.get(MODULE_KEY) or {},
            allow_unmapped=allow_unmapped,
        )
    result = Imported(output, adapter_folder(output), loaded)
    content = _content(module, root, checkpoint, result)
    write_adapter_folder(output, engine.packed_adapters(module, {"imported_from": source.name}))
    write_whole_file(content, output)
    _check_written(cls, output, dict(arguments or {}))
    return result


def _built(cls: Any, root: str, checkpoint: dict[str, Any], arguments: dict[str, Any]) -> Any:
    module = build_module(cls, root, checkpoint, arguments)
    module.configure_model()
    if not any(True for _ in module.parameters()):
        module.setup("fit")
    # It may rename back what a hook renamed on saving.
    module.on_load_checkpoint(checkpoint)
    return module


def _class_of(class_path: str) -> tuple[Any, str]:
    module, _, name = class_path.partition(":")
    if not name:
        raise ConfigError(f"--module {class_path!r}: write package.module:Class.")
    find_modules_here()
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--module {class_path!r} cannot be imported: {error}.") from error
    root = namespace_of_class(cls)
    if root is None:
        raise ConfigError(f"{class_path!r} is not a LightningModule.")
    return cls, root


def _read(source: Path) -> dict[str, Any]:
    if not source.exists():
        raise ConfigError(f"{str(source)!r}: there is no such checkpoint or folder.")
    if source.is_dir():
        raise _sharded(source)
    try:
        if source.suffix == ".safetensors":
            return {"state_dict": load_file(source)}
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{str(source)!r} cannot be read without running code in it ({first_line(error)}). If "
            "you trust where it comes from, read it once by torch.load(..., weights_only=False), "
            "and save its `state_dict`, `optimizer_states` and plain hyperparameters apart."
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        return loaded
    if isinstance(loaded, dict) and any(isinstance(v, torch.Tensor) for v in loaded.values()):
        return {"state_dict": loaded}
    raise CheckpointError(f"{str(source)!r} holds no state dict.")


def _sharded(source: Path) -> CheckpointError:
    names = {path.name for path in source.rglob("*")}
    zero = any(
        name.startswith(("zero_pp_rank_", "mp_rank_", "bf16_zero_pp_rank_")) for name in names
    )
    if zero or "zero_to_fp32.py" in names:
        how = (
            "a sharded checkpoint of DeepSpeed, whose pieces are pickles. Make one file of them "
            "where DeepSpeed is installed: from lightning.pytorch.utilities.deepspeed import "
            "convert_zero_checkpoint_to_fp32_state_dict, and import that file. The optimizer is "
            "not part of it"
        )
    elif ".metadata" in names:
        how = (
            "a sharded checkpoint of FSDP. Make one file of it first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {source}"
        )
    else:
        how = "neither a PEFT folder (adapter_config.json) nor a sharded checkpoint"
    return CheckpointError(f"{str(source)!r} is {how}.")


def _of_folder(module: Any) -> engine.ForeignLoad:
    record = engine.require_record(module)
    layers = [t for p in record.parts.values() for i in p.adapters.values() for t in i.targets]
    saved = [part.qualified(name) for part in record.parts.values() for name in part.saved]
    return engine.ForeignLoad(len(layers), list(record.parts), saved, [], [], [])


def _content(
    module: Any, root: str, checkpoint: dict[str, Any], result: Imported
) -> dict[str, Any]:
    """Returns the content of the new file; without an optimizer it cannot be resumed."""
    described = engine.describe(module)
    state = engine.trainable_state_dict(module)
    states, result.optimizer, names = optimizer_states(module, checkpoint, result.loaded.names)
    described["processes"], described["optimizers"] = [], names
    old = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": import_module(root.partition(".")[0]).__version__,
        **old,
        MODULE_KEY: {**(old.get(MODULE_KEY) or {}), **module.hparams},
        "state_dict": state,
    }
    if states is not None:
        content["optimizer_states"] = states
    else:
        content = {k: v for k, v in content.items() if k not in ("lr_schedulers", "loops")}
    content, described["left_out"] = strip_objects(content)
    module.on_save_checkpoint(content)
    return pack_checkpoint(module, content, described, tuple(state))


def _check_written(cls: Any, output: Path, arguments: dict[str, Any]) -> None:
    try:
        load_from_checkpoint(cls, output, **arguments)
    except Exception:
        remove_adapter_folder(output)
        output.unlink()
        raise

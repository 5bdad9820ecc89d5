"""Conversion of other programs' checkpoints, with their optimizer states."""

from __future__ import annotations

from collections import Counter
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
from lightning_peft.plugin.lightning_cli import find_modules_here
from lightning_peft.plugin.loading import build_module, lightning_class, load_from_checkpoint


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
    return lightning_class(cls)


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


def optimizer_states(
    module: Any, checkpoint: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[list[Any] | None, str, list[str] | None]:
    """Returns states for the optimizers of now or ``None``, what became of them, and names."""
    old = checkpoint.get("optimizer_states")
    if not old:
        return None, "not in the file", None
    try:
        optimizers = _listed(module.configure_optimizers())
    except Exception as error:
        reason = f"configure_optimizers needs a Trainer ({first_line(error)})"
        return None, f"left out: {reason}", None
    if len(old) != len(optimizers):
        return None, f"left out: {len(old)} in the file, {len(optimizers)} in the module", None
    keys = _parameter_keys(module, checkpoint["state_dict"], names)
    live = {id(param): name for name, param in module.named_parameters()}
    states = []
    for theirs, optimizer in zip(old, optimizers, strict=True):
        mapped = _mapped_state(theirs, optimizer, keys, live)
        if isinstance(mapped, str):
            return None, f"left out: {mapped}", None
        states.append(mapped)
    return states, "restored", engine.optimizer_names(optimizers)


def _listed(made: Any) -> list[Any]:
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
        made = made[0]
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    return [one["optimizer"] if isinstance(one, dict) else one for one in found if one is not None]


def _parameter_keys(
    module: Any, state: Mapping[str, Any], names: Mapping[str, str]
) -> list[str | None]:
    """Returns the names of now of all parameters of the old module, in its order.

    ``None`` stands for one that is not there any more: the values before training that PEFT keeps.
    """
    buffers = {name for name, _ in module.named_buffers()}
    seen: set[int] = set()
    keys: list[str | None] = []
    for key, value in state.items():
        # Tied parameters are one, and have one place in memory.
        if isinstance(value, torch.Tensor) and names.get(key) not in buffers:
            if value.data_ptr() not in seen or not value.numel():
                keys.append(names.get(key))
            seen.add(value.data_ptr())
    return keys


def _mapped_state(
    theirs: Mapping[str, Any], optimizer: Any, keys: list[str | None], live: Mapping[int, str]
) -> dict[str, Any] | str:
    """Moves states to the places of the same parameters, or returns why that is not certain.

    The order of the parameters in the file is taken for that of the old optimizer where the
    optimizer of now has the same, and where shapes leave no other.
    """
    groups, old_groups = optimizer.param_groups, theirs["param_groups"]
    if len(groups) != len(old_groups):
        return f"{len(old_groups)} parameter groups in the file, {len(groups)} in the module"
    written, place = [], 0
    state: dict[int, Any] = {}
    for group, old in zip(groups, old_groups, strict=True):
        params, numbers = group["params"], old["params"]
        states = {n: theirs["state"][n] for n in numbers if n in theirs["state"]}
        trained = [live[id(param)] for param in params if param.requires_grad]
        everything = len(groups) == 1 and len(numbers) == len(keys)
        orders = _orders(numbers, list(states), trained, keys, everything)
        if orders is None:
            return f"{len(numbers)} tensors in a group of the file, and {len(trained)} train in it"
        places: dict[str | None, int] = {live[id(param)]: i for i, param in enumerate(params)}
        shapes: dict[str | None, Any] = {live[id(param)]: param.shape for param in params}
        found = _certain(orders, {n: _shapes(values) for n, values in states.items()}, shapes)
        if isinstance(found, str):
            return found
        state |= {place + places[name]: states[n] for n, name in found.items()}
        written.append({**old, "params": list(range(place, place + len(params)))})
        place += len(params)
    return {"state": state, "param_groups": written}


def _orders(
    numbers: list[int],
    with_state: list[int],
    trained: list[str],
    keys: list[str | None],
    everything: bool,
) -> tuple[dict[int, str | None], dict[int, str | None]] | None:
    """Returns which number is which parameter in the order of the file, and in the one of now.

    ``None`` where ``numbers`` of a group, or those with a state, are not as many as ``trained``
    now; no names where the file lacks some. With ``everything``, the old one had all ``keys``.
    """
    training = set(trained)
    own = [key for key in keys if key in training]
    whole = everything or len(own) == len(trained)
    file = (keys if everything else own) if whole else trained
    which = next((some for some in (numbers, with_state) if len(some) == len(file)), None)
    if which is None:
        return None
    in_file = set(own) if whole else training
    rest = iter([name for name in trained if name in in_file])
    now = [next(rest) if name in in_file else name for name in file]
    then = file if whole else [None] * len(file)
    return dict(zip(which, then, strict=True)), dict(zip(which, now, strict=True))


def _certain(
    orders: tuple[dict[int, str | None], dict[int, str | None]],
    states: Mapping[int, tuple[torch.Size, ...]],
    shapes: Mapping[str | None, torch.Size],
) -> dict[int, str | None] | str:
    """Returns the names of the states where both orders agree, or shapes decide, else why not."""
    then, now = orders
    differing = Counter(states[n] for n in states if then[n] != now[n])
    if any(count > 1 and shape for shape, count in differing.items()):
        return "the file does not say in which order its optimizer had tensors of the same shape"
    for order in orders:
        misfits = [n for n in states if any(s != shapes.get(order[n]) for s in states[n])]
        misfits += [n for n in states if order[n] not in shapes]
        if not misfits:
            return {n: order[n] for n in states}
    return f"state {misfits[0]} in the file is not that of a tensor that trains"


def _shapes(values: Mapping[str, Any]) -> tuple[torch.Size, ...]:
    return tuple(v.shape for v in values.values() if isinstance(v, torch.Tensor) and v.ndim)

"""Saving adapters as folders in PEFT's own format, and loading them strictly.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``provenance.json``
(what produced it). Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from lightning_peft.engine.adapters import (
    adapter_parameters,
    refuse_merged,
    set_adapter,
    trained_parameters,
)
from lightning_peft.engine.configuration import (
    BASE_CHANGING_INITS,
    config_differences,
    config_from_dict,
)
from lightning_peft.engine.files.adapter_format import (
    CONFIG_FILE,
    adapter_folder,
    adapter_tensors,
    exported_config,
    read_adapter,
)
from lightning_peft.engine.injection import inject
from lightning_peft.engine.record import PartRecord, record_of, require_record
from lightning_peft.engine.selection.adapter_names import check_adapter_name
from lightning_peft.engine.selection.parts import find_parts
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    TargetModulesError,
    UnsupportedError,
    itemize,
)


def save_adapter(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one adapter as a folder in PEFT's format.

    A module with one adapted part gets the files in ``path`` itself; with several, in one
    sub-folder per part. Each file is written beside its place and moved there when complete.

    Args:
        module: A module with adapters.
        path: The folder; it is made.
        adapter_name: Which adapter; by default the active one.
        provenance: Facts to add to ``provenance.json`` (data, metrics, step).

    Returns:
        The folder.

    Raises:
        ConfigError: If several adapters are active and none was named, or the name is unknown.
        LifecycleError: If the module has no adapters.
    """
    record = require_record(module)
    if adapter_name is None and len(record.active) != 1:
        raise ConfigError(
            f"Several adapters are active ({', '.join(record.active)}): say which one to save by "
            "`adapter_name`."
        )
    name = adapter_name or record.active[0]
    if name not in record.adapter_names:
        raise ConfigError(
            f"adapter_name={name!r}: this module's adapters are {', '.join(record.adapter_names)}."
        )
    folder = Path(path)
    for file, content in _files(module, name, provenance or {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / file, content)
    return folder


def packed_adapters(module: nn.Module, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the files of all adapters by relative path, as PEFT's ``save_pretrained`` lays out.

    The first adapter is at the top, others in sub-folders of their names. Where the first one has
    sub-folders for several parts, it is in a sub-folder of its name too.
    """
    record = require_record(module)
    names = record.adapter_names
    parts = [part for part in record.parts.values() if names[0] in part.adapters]
    top = names[0] if len(names) == 1 or len(parts) == 1 else None
    files: dict[str, bytes] = {}
    for name in names:
        folder = "" if name == top else f"{name}/"
        files |= {f"{folder}{k}": v for k, v in _files(module, name, provenance).items()}
    return files


def _files(module: nn.Module, name: str, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    record = require_record(module)
    parts = {key: part for key, part in record.parts.items() if name in part.adapters}
    files: dict[str, bytes] = {}
    for key, entry in parts.items():
        folder = "" if len(parts) == 1 else f"{key}/"
        made = adapter_folder(module.get_submodule(key), entry, name, provenance)
        files |= {f"{folder}{file}": content for file, content in made.items()}
    return files


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_adapter(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    adapt: str | None = None,
    is_trainable: bool = False,
    check_base: bool = True,
    quantization_config: BitsAndBytesConfig | None = None,
) -> None:
    """Adds an adapter from a folder in PEFT's format, ours or PEFT's own, and makes it active.

    If the module has an adapter of that name already, its values are replaced.

    Args:
        module: The module, with or without adapters.
        path: The folder.
        adapter_name: How the adapter is called from now on.
        adapt: The submodule to put it on; by default the only pretrained part.
        is_trainable: Whether its tensors get gradients.
        check_base: Refuse a base other than the recorded one. Files by plain PEFT record none.
        quantization_config: Quantizes the linear layers of a module without adapters first.

    Raises:
        CheckpointError: If a file is missing, damaged or pickled, or does not fit; every missing
            or unexpected tensor and every shape is named.
        BaseMismatchError: If the base is another one than the adapter was trained on.
        ConfigError: If the module has several parts and the folder does not say which one is
            meant.
        LifecycleError: If adapters are merged into the weights.
    """
    check_adapter_name(adapter_name)
    folders = _folders(Path(path), adapt)
    read = {name: read_adapter(folder) for name, folder in folders.items()}
    if record_of(module) is not None:
        refuse_merged(module, "Loading an adapter")
    for asked, (fields, tensors, facts) in read.items():
        folder = folders[asked]
        name = _part_name(module, asked, folder)
        record = record_of(module)
        if (
            record is None
            or name not in record.parts
            or adapter_name not in (record.parts[name].adapters)
        ):
            if quantization_config is not None:
                refuse_residual_base(facts, folder)
            _inject_for_file(module, fields, name, adapter_name, folder, quantization_config)
        entry = require_record(module).parts[name]
        if check_base:
            _check_base(facts, entry, folder)
        part = module.get_submodule(name)
        _check_fit(part, entry, adapter_name, fields, tensors, folder)
        _fill(part, entry, adapter_name, tensors)
    set_adapter(module, adapter_name)
    if not is_trainable:
        _freeze_adapter(module, adapter_name)


def _folders(path: Path, adapt: str | None) -> dict[str | None, Path]:
    if (path / CONFIG_FILE).is_file():
        return {adapt: path}
    found = sorted(path.glob(f"*/{CONFIG_FILE}"))
    inner: dict[str | None, Path] = {file.parent.name: file.parent for file in found}
    if adapt in inner:
        return {adapt: inner[adapt]}
    if not inner:
        raise CheckpointError(
            f"{str(path)!r} holds no {CONFIG_FILE}: it is no adapter folder. Checkpoints of a "
            "Trainer are loaded by lightning_peft.load_from_checkpoint or by `ckpt_path`."
        )
    if adapt is not None:
        raise CheckpointError(
            f"{str(path)!r} holds adapters for the parts {', '.join(map(repr, inner))} and none "
            f"for adapt={adapt!r}."
        )
    return inner


def _part_name(module: nn.Module, asked: str | None, folder: Path) -> str:
    record = record_of(module)
    if asked is not None:
        return asked
    parts = list(find_parts(module) if record is None else record.parts)
    if len(parts) != 1:
        raise ConfigError(
            f"{folder.name!r} holds one adapter and the module has several parts to put it on "
            f"({', '.join(map(repr, parts))}): say which one by `adapt`."
        )
    return parts[0]


def _inject_for_file(
    module: nn.Module,
    fields: Mapping[str, Any],
    part_name: str,
    adapter_name: str,
    folder: Path,
    quantization: BitsAndBytesConfig | None,
) -> None:
    fields = {key: value for key, value in fields.items() if key != "auto_mapping"}
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and not init.lower().startswith(BASE_CHANGING_INITS):
        # The values come from the file; only inits that also rewrite the base must run again.
        fields["init_lora_weights"] = True
    fields["inference_mode"] = False
    try:
        inject(
            module,
            config_from_dict(fields),
            quantization_config=quantization,
            adapt=[part_name],
            adapter_name=adapter_name,
        )
    except (ConfigError, TargetModulesError) as error:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} does not fit {type(module).__name__}: {error}"
        ) from error


def refuse_residual_base(facts: Mapping[str, Any], folder: Path) -> None:
    """Refuses to quantize the base of an adapter whose initialisation rewrote that base first.

    Raises:
        UnsupportedError: If ``facts`` say so.
    """
    init = str((facts.get("config") or {}).get("init_lora_weights", ""))
    if facts.get("quantization") and init.lower().startswith(BASE_CHANGING_INITS):
        raise UnsupportedError(
            f"The adapter in {str(folder)!r} was trained with init_lora_weights={init!r} on a "
            "quantized base: what was quantized was the base less the first factors, and the "
            "folder is for the base as it was loaded. Quantizing that gives other weights than "
            "those in training. Use the base in 16 bits, or the checkpoint "
            "(lightning_peft.load_from_checkpoint)."
        )


def _check_base(facts: Mapping[str, Any], entry: PartRecord, folder: Path) -> None:
    base = facts.get("base") or {}
    mine = entry.base.digest()
    if base.get("fingerprint") not in (None, mine):
        raise BaseMismatchError(
            f"The adapter in {str(folder)!r} was trained on another base"
            f" ({base.get('name_or_path') or 'fingerprint ' + base['fingerprint'][:12]}) than "
            f"{entry.base_id.get('name_or_path') or 'this module'} "
            f"(fingerprint {mine[:12]}). On this one it would compute something "
            "else. Load the base it was trained on, or pass check_base=False if they are meant "
            "to differ."
        )


def _check_fit(
    part: nn.Module,
    entry: PartRecord,
    name: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    mine = exported_config(part, entry, name)
    # What the values were before training is no matter, and files may leave fields out.
    compared = {key: value for key, value in fields.items() if key in mine}
    compared["init_lora_weights"] = mine.get("init_lora_weights")
    problems = [
        f"{key}={fields[key]!r} in the file and {mine[key]!r} in the module"
        for key in config_differences({k: mine[k] for k in compared if k in mine}, compared)
        if key != "modules_to_save"
    ]
    expected = adapter_tensors(part, entry, name)
    problems += [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    problems += [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(value.shape)} in the module"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems += _tie_problems(part, tensors)
    if problems:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} does not fit {type(part).__name__}:"
            + itemize(problems)
        )


def _tie_problems(part: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """PEFT trains copies of tied modules apart; one tensor cannot take two values."""
    first: dict[int, str] = {}
    problems = []
    for key, param in part.named_parameters(remove_duplicate=False):
        if key in tensors:
            other = first.setdefault(id(param), key)
            if not torch.equal(tensors[key], tensors[other]):
                problems.append(
                    f"{key} and {other} have different values in the file and are tied in the "
                    "module: untie them (tie_word_embeddings=False)"
                )
    return problems


@torch.no_grad()
def _fill(part: nn.Module, entry: PartRecord, name: str, tensors: Mapping[str, Tensor]) -> None:
    if not entry.adapters[name].in_place:
        set_peft_model_state_dict(part, dict(tensors), adapter_name=name)
    state = part.state_dict()
    for key, value in tensors.items():
        live = re.sub(r"\.(lora_[AB])\.weight$", lambda m: f".{m[1]}.{name}.weight", key)
        live = re.sub(r"\.(lora_embedding_[AB])$", lambda m: f".{m[1]}.{name}", live)
        if entry.adapters[name].in_place:
            live = live.replace(".base_layer.", ".")
        if live not in state:
            continue
        if state[live].is_meta:
            # An outline has no memory to copy into.
            made = {live: value.to(state[live].dtype)}
            part.load_state_dict(made, strict=False, assign=True)
        else:
            state[live].copy_(value)


def _freeze_adapter(module: nn.Module, adapter_name: str) -> None:
    for entry in require_record(module).parts.values():
        part = module.get_submodule(entry.name)
        if adapter_name not in entry.adapters:
            continue
        others = {n for n in adapter_parameters(part) if adapter_name not in n.split(".")}
        for name, param in trained_parameters(part, entry).items():
            if name not in others:
                param.requires_grad_(False)

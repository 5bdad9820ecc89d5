"""Strict loading of adapter folders: completely, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor, nn

from lightning_peft.engine.adapters import (
    adapted_layers,
    adapter_file_tensors,
    adapter_parameters,
    refuse_merged,
    set_adapter,
    trained_parameters,
)
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.files.adapter_checks import (
    AdapterFolder,
    check_base_of,
    check_fit,
    check_ranks,
    fields_for,
    saved_in_file,
    with_new_names,
    without_repeated,
    without_wrappers,
)
from lightning_peft.engine.files.adapter_fields import checked_fields
from lightning_peft.engine.files.adapter_format import CONFIG_FILE, read_adapter
from lightning_peft.engine.files.base_tensors import include_in_files
from lightning_peft.engine.injection import inject_config, kinds_left_dense
from lightning_peft.engine.layers.tokens import token_tensors
from lightning_peft.engine.methods.lora_config import changes_base, quantizes_another_base
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.record import record_of, require_record
from lightning_peft.engine.rollback import restored_on_error
from lightning_peft.engine.selection.adapter_names import check_adapter_name
from lightning_peft.engine.selection.planning import InjectionRequest
from lightning_peft.engine.selection.scope import find_parts
from lightning_peft.engine.vocabulary import (
    resized_as_recorded,
    trains_new_rows,
    vocabulary_mismatch,
)
from lightning_peft.errors import (
    CheckpointError,
    ConfigError,
    TargetModulesError,
    UnsupportedError,
)


def load_adapter(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    adapt: str | None = None,
    is_trainable: bool = False,
    check_base: bool = True,
    quantization_config: Any | None = None,
    allow_unknown_fields: bool = False,
) -> None:
    """Adds an adapter from a folder in PEFT's format, ours or PEFT's own, and makes it active.

    If the module has an adapter of that name already, its values are replaced. A folder that is
    refused leaves the module as it was. Base weights in a folder are used as PEFT uses them.

    Args:
        module: The module, with or without adapters.
        path: The folder.
        adapter_name: How the adapter is called from now on.
        adapt: The submodule to put it on; by default the only pretrained part.
        is_trainable: Whether its tensors get gradients.
        check_base: Refuse a base other than the recorded one. Files by plain PEFT record none.
        quantization_config: Quantizes the linear layers of a module without adapters first, but
            for those whose weights are in the folder, as :class:`MergeAndRestart` leaves them.
        allow_unknown_fields: Load a folder of a later PEFT though it switches on what the installed
            one does not know. Unknown fields that are set are named in a warning.

    Raises:
        CheckpointError: If a file is missing, damaged or pickled, or does not fit; every missing
            or unexpected tensor and every shape is named.
        BaseMismatchError: If the base is another one than the adapter was trained on.
        ConfigError: If the module has several parts and the folder names none of them.
        LifecycleError: If adapters are merged into the weights.
        UnsupportedError: If the adapter is of a kind that cannot be injected.
    """
    check_adapter_name(adapter_name)
    paths = _paths(module, Path(path), adapt, adapter_name)
    read = {asked: read_adapter(folder) for asked, folder in paths.items()}
    if record_of(module) is not None:
        refuse_merged(module, "Loading an adapter")
    folders = []
    for asked, (written, tensors, facts) in read.items():
        fields = checked_fields(written, paths[asked], allow_unknown=allow_unknown_fields)
        if quantization_config is not None:
            refuse_residual_base(facts, paths[asked])
        _refuse_random_base(fields, paths[asked])
        folders.append(_fitted(module, asked, paths[asked], fields, tensors, facts))
    sizes = [_vocabulary(module, folder) for folder in folders]
    rewritten = _rewritten(module, folders)
    with restored_on_error([module], rewritten), resized_as_recorded(module, sizes):
        for folder in folders:
            _put_on(module, folder, adapter_name, check_base, quantization_config)
        for folder in folders:
            _fill(module, folder, adapter_name)
        set_adapter(module, adapter_name)
        if not is_trainable:
            _freeze_adapter(module, adapter_name)


def _vocabulary(module: nn.Module, folder: AdapterFolder) -> tuple[str, dict[str, Any], bool]:
    """Returns a part, what is recorded of its base, and whether the file has its embeddings."""
    base = folder.facts.get("base") or {}
    rows = base.get("vocabulary")
    brought = any(
        value.ndim == 2 and value.shape[0] == rows and "lora_" not in key
        for key, value in folder.tensors.items()
    )
    part = module.get_submodule(folder.part)
    brought = brought or trains_new_rows(folder.fields, base, part)
    problem = vocabulary_mismatch(base, part)
    if problem and not brought:
        raise CheckpointError(
            f"The adapter in {str(folder.path)!r} does not fit: {problem}, and train with "
            "trainable_token_indices naming the new rows where they are to be kept."
        )
    return folder.part, base, brought


def _paths(
    module: nn.Module, path: Path, adapt: str | None, adapter_name: str
) -> dict[str | None, Path]:
    """Returns the folders to read, by the names of the parts that they are for."""
    if (path / CONFIG_FILE).is_file():
        return {adapt: path}
    found = sorted(path.glob(f"*/{CONFIG_FILE}"))
    inner: dict[str | None, Path] = {file.parent.name: file.parent for file in found}
    if not inner:
        raise CheckpointError(
            f"{str(path)!r} holds no {CONFIG_FILE}: {_what_is(path)}. Checkpoints of a Trainer are "
            "loaded by lightning_peft.load_from_checkpoint or by `ckpt_path`."
        )
    known = dict(module.named_modules(remove_duplicate=False))
    if adapt is None and not any(name in known for name in inner):
        # PEFT writes a sub-folder for each adapter that is not called "default".
        if len(inner) > 1 and adapter_name not in inner:
            raise CheckpointError(
                f"{str(path)!r} holds several adapters, {', '.join(map(repr, inner))}: name the "
                f"folder of one of them, such as {str(found[0].parent)!r}."
            )
        return {None: inner.get(adapter_name, found[0].parent)}
    if adapt in inner:
        return {adapt: inner[adapt]}
    if adapt is not None:
        raise CheckpointError(
            f"{str(path)!r} holds adapters for the parts {', '.join(map(repr, inner))} and none "
            f"for adapt={adapt!r}."
        )
    return inner


def _what_is(path: Path) -> str:
    if not path.exists():
        return (
            "there is nothing of that name on this machine. An adapter on the hub is downloaded "
            "first, by huggingface_hub.snapshot_download"
        )
    return "it is not an adapter folder" if path.is_dir() else "it is a file, not a folder"


def _fitted(
    module: nn.Module,
    asked: str | None,
    path: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> AdapterFolder:
    name = _part_name(module, asked, path)
    try:
        part = find_parts(module, [name])[name]
    except TargetModulesError as error:
        raise _unfit(module, path, error) from error
    check_ranks(fields, tensors)
    tensors = without_repeated(with_new_names(part, without_wrappers(part, tensors)))
    fields = fields_for(part, fields)
    saved = saved_in_file(part, fields.get("modules_to_save") or [], facts, tensors)
    fields["modules_to_save"] = sorted(saved) or None
    return AdapterFolder(path, name, fields, dict(tensors), dict(facts))


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


def _rewritten(module: nn.Module, folders: list[AdapterFolder]) -> list[Tensor]:
    """Returns the weights whose values an initialisation may change before a folder is refused."""
    return [
        param
        for folder in folders
        if changes_base(folder.fields)
        for param in module.get_submodule(folder.part).parameters()
        if param.is_floating_point()
    ]


def _put_on(
    module: nn.Module,
    folder: AdapterFolder,
    adapter_name: str,
    check_base: bool,
    quantization: Any | None,
) -> None:
    """Adds the adapter of a folder where it is not there yet, and checks that all of it fits."""
    record = record_of(module)
    known = record.parts.get(folder.part) if record is not None else None
    if known is None or adapter_name not in known.adapters:
        _inject_for_file(module, folder, adapter_name, quantization)
    entry = require_record(module).parts[folder.part]
    if check_base:
        check_base_of(module, folder, entry)
    _check_projections(module.get_submodule(folder.part), folder, adapter_name)
    replaced = check_fit(module.get_submodule(folder.part), entry, adapter_name, folder)
    if replaced:
        include_in_files(module, entry, replaced)


def _check_projections(part: nn.Module, folder: AdapterFolder, adapter_name: str) -> None:
    """Takes random projections out of what was read, once they are those of the module."""
    names = method_of(folder.fields).projections
    keys = [key for key in folder.tensors if key.rpartition(".")[2] in names]
    layer = next(iter(adapted_layers(part).values()))
    for key in keys:
        # One of the model, or the same again for each layer.
        read, name = folder.tensors.pop(key), key.rpartition(".")[2]
        drawn = getattr(layer, name)[adapter_name]
        if read.shape != drawn.shape or not torch.equal(read.to(drawn), drawn):
            raise CheckpointError(
                f"The adapter in {str(folder.path)!r} was trained with other random projections "
                f"({name}) than PEFT draws here from projection_prng_key="
                f"{folder.fields.get('projection_prng_key')!r} for the adapted layers. Neither "
                "checkpoints nor files of this package hold them. Load it by "
                "peft.PeftModel.from_pretrained."
            )


def _inject_for_file(
    module: nn.Module,
    folder: AdapterFolder,
    adapter_name: str,
    quantization: Any | None,
) -> None:
    fields, base = dict(folder.fields), folder.facts.get("base") or {}
    if isinstance(fields.get("init_lora_weights"), str) and not changes_base(fields):
        # The values come from the file; only inits that also rewrite the base must run again.
        fields["init_lora_weights"] = True
    fields["inference_mode"] = False
    try:
        config = config_from_dict(fields)
        rows = {
            layer: tuple(map(tuple, r)) for layer, r in (folder.facts.get("rows") or {}).items()
        }
        request = InjectionRequest(
            config,
            quantization,
            adapter_name,
            {folder.part: folder.saved},
            {folder.part: rows},
            dense_kinds=kinds_left_dense(base) if folder.facts.get("quantization") else (),
            # Weights that adapters were merged into in training.
            dense=frozenset(key.replace(".base_layer.", ".") for key in folder.tensors),
        )
        inject_config(module, request, [folder.part])
    except (ConfigError, TargetModulesError) as error:
        raise _unfit(module, folder.path, error) from error


def _refuse_random_base(fields: Mapping[str, Any], path: Path) -> None:
    init = str(fields.get("init_lora_weights"))
    if init.lower().startswith(("pissa_niter", "corda", "lora_ga")):
        raise CheckpointError(
            f"The adapter in {str(path)!r} has init_lora_weights={init!r}: it is for a base that "
            "was rewritten with random numbers or data that the folder does not hold. Write it "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which "
            "makes it one for the base as it was loaded."
        )


def _unfit(module: nn.Module, path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The adapter in {str(path)!r} does not fit {type(module).__name__}: {error}"
    )


def refuse_residual_base(facts: Mapping[str, Any], folder: Path) -> None:
    """Refuses to quantize the base of an adapter whose initialisation rewrote that base first."""
    config = facts.get("config") or {}
    if facts.get("quantization") and quantizes_another_base(config):
        raise UnsupportedError(
            f"The adapter in {str(folder)!r} was trained with "
            f"init_lora_weights={config['init_lora_weights']!r} on a "
            "quantized base: what was quantized was the base less the first factors, and the "
            "folder is for the base as it was loaded. Quantizing that gives other weights than "
            "those in training. Use the 16-bit base, or the checkpoint "
            "(lightning_peft.load_from_checkpoint)."
        )


@torch.no_grad()
def _fill(module: nn.Module, folder: AdapterFolder, name: str) -> None:
    part, tensors = module.get_submodule(folder.part), folder.tensors
    info = require_record(module).parts[folder.part].adapters[name]
    made = token_tensors(part, name)
    if info.in_place:
        made |= adapter_file_tensors(part, info.targets, name)
    else:
        set_peft_model_state_dict(part, dict(tensors), adapter_name=name)
    names = {id(param): live for live, param in part.named_parameters()}
    adapter = {key: names[id(param)] for key, param in made.items()}
    state = part.state_dict()
    for key, value in tensors.items():
        live = adapter.get(key, key)
        if live not in state:
            # PEFT's name for what is in an adapted layer itself.
            live = live.replace(".base_layer.", ".")
        if live not in state:
            continue
        if state[live].is_meta:
            # An outline has no memory to copy into.
            assigned = {live: value.to(state[live].dtype)}
            part.load_state_dict(assigned, strict=False, assign=True)
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

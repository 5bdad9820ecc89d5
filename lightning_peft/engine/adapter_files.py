"""Adapters as folders in PEFT's own format, readable by ``PeftModel.from_pretrained``.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``provenance.json``
(what produced it). Keys are relative to the adapted submodule. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_peft.engine.adapters import activate, set_adapter
from lightning_peft.engine.configuration import config_from_dict, plain
from lightning_peft.engine.injection import inject
from lightning_peft.engine.record import AdapterInfo, PartRecord, record_of, require_record
from lightning_peft.engine.targets import compact
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    TargetModulesError,
    itemize,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "provenance.json"
PREFIX = "base_model.model."
_PACKAGES = (
    "lightning-peft",
    "torch",
    "peft",
    "transformers",
    "bitsandbytes",
    "lightning",
    "pytorch-lightning",
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

    The first adapter is at the top, others in sub-folders of their names.
    """
    names = require_record(module).adapter_names
    files = _files(module, names[0], provenance)
    for name in names[1:]:
        files |= {f"{name}/{k}": v for k, v in _files(module, name, provenance).items()}
    return files


def _files(module: nn.Module, name: str, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    record = require_record(module)
    parts = {key: part for key, part in record.parts.items() if name in part.adapters}
    files = {}
    for key, entry in parts.items():
        folder = "" if len(parts) == 1 else f"{key or 'module'}/"
        part = module.get_submodule(key)
        blob = save(
            {f"{PREFIX}{k}": v for k, v in adapter_tensors(part, entry, name).items()},
            metadata={"format": "pt"},
        )
        facts = provenance_of(entry, name) | plain(dict(provenance))
        facts["adapter_sha256"] = hashlib.sha256(blob).hexdigest()
        files[f"{folder}{WEIGHTS_FILE}"] = blob
        files[f"{folder}{CONFIG_FILE}"] = _json(exported_config(part, entry, name))
        files[f"{folder}{PROVENANCE_FILE}"] = _json(facts)
    return files


def adapter_tensors(part: nn.Module, entry: PartRecord, name: str) -> dict[str, Tensor]:
    """Returns the tensors of one adapter under PEFT's keys, without its ``base_model.model.``.

    Besides the low-rank factors: biases that are trained, ``modules_to_save``, and trainable
    heads inside the part, without which the adapter alone would not give the trained model.
    """
    info = entry.adapters[name]
    if info.in_place:
        tensors = _in_place_tensors(part, info, name)
    else:
        tensors = get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
    state = part.state_dict()
    owners = [*entry.saved, *_trained_heads(part, entry)]
    tensors |= {k: v for k, v in state.items() if any(k.startswith(f"{o}.") for o in owners)}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _in_place_tensors(part: nn.Module, info: AdapterInfo, name: str) -> dict[str, Tensor]:
    tensors = {}
    for target in info.targets:
        layer = part.get_submodule(target)
        tensors[f"{target}.lora_A.weight"] = layer.lora_A[name].weight
        tensors[f"{target}.lora_B.weight"] = layer.lora_B[name].weight
    biases = info.config.get("bias", "none")
    if biases != "none":
        adapted = set(info.targets)
        for key, param in part.named_parameters():
            owner, _, leaf = key.rpartition(".")
            if leaf == "bias" and owner in adapted:
                # PEFT keeps the layer that it wraps, and so its bias, under `base_layer`.
                tensors[f"{owner}.base_layer.bias"] = param
            elif leaf == "bias" and biases == "all":
                tensors[key] = param
    return tensors


def _trained_heads(part: nn.Module, entry: PartRecord) -> list[str]:
    return [
        head
        for head in entry.heads
        if any(param.requires_grad for param in part.get_submodule(head).parameters())
    ]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def exported_config(part: nn.Module, entry: PartRecord, name: str) -> dict[str, Any]:
    """Returns the ``adapter_config.json`` that loads the adapter onto the plain base model."""
    info = entry.adapters[name]
    config = dict(info.config)
    config["target_modules"] = compact(info.targets, part)
    config["layers_to_transform"] = config["exclude_modules"] = None
    saved = [*entry.saved, *_trained_heads(part, entry)]
    config["modules_to_save"] = saved or None
    config["inference_mode"] = True
    config["base_model_name_or_path"] = entry.base_id["name_or_path"]
    config["revision"] = entry.base_id["revision"]
    return {key: value for key, value in config.items() if key != "auto_mapping"}


def provenance_of(entry: PartRecord, name: str) -> dict[str, Any]:
    """Returns what produced the adapter: base, settings, versions, seed, time (UTC)."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "base": {**entry.base_id, "fingerprint": entry.base.digest(), "part": entry.name},
        "config": plain(entry.adapters[name].config),
        "quantization": entry.quantization,
        "versions": versions,
        "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def load_adapter(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    adapt: str | None = None,
    is_trainable: bool = False,
    check_base: bool = True,
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

    Raises:
        CheckpointError: If a file is missing, is no safetensors file, or does not fit; every
            missing or unexpected tensor and every shape is named.
        BaseMismatchError: If the base is another one than the adapter was trained on.
    """
    folders = _part_folders(Path(path), adapt)
    record = record_of(module)
    for part_name, folder in folders.items():
        fields, tensors = read_adapter(folder)
        if record is None or adapter_name not in record.adapter_names:
            _inject_for_file(module, fields, tensors, part_name, adapter_name, folder)
            record = require_record(module)
        entry = record.parts[_only_part(list(record.parts), part_name, folder)]
        part = module.get_submodule(entry.name)
        if check_base:
            _check_provenance(folder, entry)
        _fill(part, entry, adapter_name, tensors, folder)
    set_adapter(module, adapter_name)
    if not is_trainable:
        for param_name, param in module.named_parameters():
            if re.search(rf"\.lora_[AB]\.{re.escape(adapter_name)}\.", param_name):
                param.requires_grad_(False)


def _part_folders(path: Path, adapt: str | None) -> dict[str | None, Path]:
    if (path / CONFIG_FILE).is_file():
        return {adapt: path}
    inner = sorted(child.parent for child in path.glob(f"*/{CONFIG_FILE}"))
    if not inner:
        raise CheckpointError(
            f"{str(path)!r} holds no {CONFIG_FILE}: it is no adapter folder. Checkpoints of a "
            "Trainer are loaded by lightning_peft.load_from_checkpoint or by `ckpt_path`."
        )
    return {("" if folder.name == "module" else folder.name): folder for folder in inner}


def _only_part(parts: list[str], asked: str | None, folder: Path) -> str:
    if asked is not None:
        return asked
    if len(parts) != 1:
        raise ConfigError(
            f"{folder.name!r} holds one adapter and the module has several adapted parts "
            f"({', '.join(map(repr, parts))}): say which one by `adapt`."
        )
    return parts[0]


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads an adapter folder without unpickling anything.

    Returns:
        The fields of ``adapter_config.json`` and the tensors, keys without PEFT's prefix.

    Raises:
        CheckpointError: If a file is missing or damaged; pickled adapters are refused.
    """
    config_file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = [file.name for file in folder.glob("*.bin")]
        raise CheckpointError(
            f"{str(folder)!r} holds no {WEIGHTS_FILE}"
            + (
                f", only {pickled[0]!r}, which is a pickle and can run code when it is read. Ask "
                "for the safetensors file, or convert it with PEFT where you trust its source."
                if pickled
                else "."
            )
        )
    try:
        fields = json.loads(config_file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{str(config_file)!r} is no JSON: {error}") from error
    if not isinstance(fields, dict) or "peft_type" not in fields:
        raise CheckpointError(f"{str(config_file)!r} does not say `peft_type`.")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(weights)!r} is no complete safetensors file ({error}). It was cut short or is "
            "another format; nothing of it was executed."
        ) from error
    return fields, {key.removeprefix(PREFIX): value for key, value in tensors.items()}


def _inject_for_file(
    module: nn.Module,
    fields: dict[str, Any],
    tensors: Mapping[str, Tensor],
    part_name: str | None,
    adapter_name: str,
    folder: Path,
) -> None:
    fields = {k: v for k, v in fields.items() if k != "auto_mapping"}
    init = fields.get("init_lora_weights")
    if isinstance(init, str):
        # The values come from the file; only inits that also rewrite the base must run again.
        changes = init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
        fields["init_lora_weights"] = init if changes else True
    fields["inference_mode"] = False
    try:
        inject(
            module,
            config_from_dict(fields),
            adapt=None if part_name is None else [part_name],
            adapter_name=adapter_name,
        )
    except TargetModulesError as error:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} does not fit {type(module).__name__}: {error}"
        ) from error


def _check_provenance(folder: Path, entry: PartRecord) -> None:
    file = folder / PROVENANCE_FILE
    if not file.is_file():
        return
    facts = json.loads(file.read_text())
    base = facts.get("base", {})
    if base.get("fingerprint") not in (None, entry.base.digest()):
        raise BaseMismatchError(
            f"The adapter in {str(folder)!r} was trained on another base"
            f" ({base.get('name_or_path') or 'fingerprint ' + base['fingerprint'][:12]}) than "
            f"{entry.base_id.get('name_or_path') or 'this module'} "
            f"(fingerprint {entry.base.digest()[:12]}). On this one it would compute something "
            "else. Load the base it was trained on, or pass check_base=False if they are meant "
            "to differ."
        )


def _fill(
    part: nn.Module, entry: PartRecord, name: str, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    info = entry.adapters[name]
    expected = adapter_tensors(part, entry, name)
    problems = [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    problems += [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(value.shape)} in the module"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} does not fit {type(part).__name__}:"
            + itemize(problems)
        )
    if info.in_place:
        _copy_in_place(part, name, tensors)
    else:
        set_peft_model_state_dict(part, dict(tensors), adapter_name=name)
        own = part.state_dict()
        part.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)


@torch.no_grad()
def _copy_in_place(part: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    activate(part, (name,))
    state = part.state_dict()
    for key, value in tensors.items():
        live = re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{name}.weight", key)
        live = live.replace(".base_layer.", ".")
        state[live].copy_(value)

"""Content of adapter folders in PEFT's format.

Keys are relative to the adapted submodule, so that ``PeftModel.from_pretrained`` finds them on the
plain base model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.adapters import adapter_file_tensors, adapter_parameters, trained_heads
from lightning_peft.engine.configuration import config_from_dict
from lightning_peft.engine.files.base_tensors import changed_buffers, keys_in_file
from lightning_peft.engine.files.peft_names import replaced_under_one_name, saved_entries
from lightning_peft.engine.files.state_dicts import quantized_holders
from lightning_peft.engine.fingerprint import Fingerprint, checksum
from lightning_peft.engine.layers.adapter import without_adapters
from lightning_peft.engine.layers.attention import projection_scale, projections
from lightning_peft.engine.layers.expert_weights import parameter_name
from lightning_peft.engine.layers.mixin import class_key
from lightning_peft.engine.layers.tokens import token_tensors
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import loftq_settings, quantizes_another_base
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.model_types import retargeted_by_peft, taken_for_experts
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.record import AdaptedModuleRecord, AdapterInfo
from lightning_peft.engine.selection.parts import inside
from lightning_peft.engine.selection.targets import PATTERN_FIELDS, patterns_for, shortest_suffixes
from lightning_peft.errors import CheckpointError, itemize

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "provenance.json"
PREFIX = "base_model.model."
# PEFT's prefix, in what torch.compile, FSDP, DDP and DeepSpeed put around it.
_PREFIX = re.compile(
    r"^(?:(?:_orig_mod|_fsdp_wrapped_module|module|_forward_module)\.)*base_model\.model\."
)
_DEFAULT_NAME = re.compile(r"(?<=\.lora_[AB])\.default(?=\.weight$)")
_PACKAGES = (
    *("lightning-peft", "torch", "peft", "transformers", "bitsandbytes"),
    *("lightning", "pytorch-lightning"),
)


def adapter_folder(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, provenance: Mapping[str, Any]
) -> dict[str, bytes]:
    """Returns the three files of one adapter on one part, by name.

    ``provenance`` is added to ``provenance.json``.
    """
    tensors, config = adapter_tensors(part, entry, name), exported_config(part, entry, name)
    initial = entry.adapters[name].initial
    if initial:
        method: Any = method_of(config)
        tensors, config = method.for_plain_base(tensors, config, initial)
    blob = save({f"{PREFIX}{k}": v for k, v in tensors.items()}, metadata={"format": "pt"})
    facts = provenance_of(part, entry, name) | to_primitives(dict(provenance))
    facts["adapter_sha256"] = hashlib.sha256(blob).hexdigest()
    return {WEIGHTS_FILE: blob, CONFIG_FILE: _json(config), PROVENANCE_FILE: _json(facts)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def adapter_tensors(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, saved: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Returns the tensors of one adapter under PEFT's keys, without its ``base_model.model.``.

    Besides the low-rank factors: biases that are trained, ``modules_to_save``, and trainable
    heads inside the part, without which the adapter alone would not give the trained model.

    Contiguous tensors on the CPU that share no memory with each other. ``saved`` names the modules
    to return in full; by default those of :func:`saved_modules`.
    """
    info = entry.adapters[name]
    if info.in_place:
        tensors = _in_place_tensors(part, info, name)
    else:
        tensors = get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
    tensors |= token_tensors(part, name)
    state = part.state_dict()
    keys = keys_in_file(entry, info.targets)
    tensors |= {key: state[live] for live, key in keys.items()}
    for live, layer in quantized_holders(part, keys).items():
        with without_adapters(layer):
            tensors[keys[live]] = layer.effective_weight()
    tensors |= changed_buffers(part, entry)
    owners = saved_modules(part, entry, name) if saved is None else list(saved)
    adapters = adapter_parameters(part)
    tensors |= {
        key: value for key, value in state.items() if inside(key, owners) and key not in adapters
    }
    # Cloned: safetensors refuses tensors that are tied, as in a saved embedding and its output.
    values = {key: tensor.detach() for key, tensor in tensors.items()}
    return {
        key: (value if value.is_meta else value.cpu()).clone().contiguous()
        for key, value in values.items()
    }


def _in_place_tensors(part: nn.Module, info: AdapterInfo, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {**adapter_file_tensors(part, info.targets, name)}
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


def saved_modules(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> list[str]:
    """Returns the names of the modules that the files of the adapter ``name`` hold in full.

    Those of ``modules_to_save``, and the heads trained with this adapter, or have other
    values than when the adapter was added.
    """
    heads = entry.adapters[name].heads
    trained = trained_heads(part, heads)
    adapters = {id(param) for param in adapter_parameters(part).values()}
    changed = [
        head
        for head in heads
        if head not in trained
        and any(
            checksum(param) != entry.loaded.tensors[f"{head}.{key}"][1]
            for key, param in part.get_submodule(head).named_parameters()
            if id(param) not in adapters
            and param.is_floating_point()
            and f"{head}.{key}" in entry.loaded.tensors
        )
    ]
    return [*entry.saved, *(head for head in heads if head in {*trained, *changed})]


def exported_config(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> dict[str, Any]:
    """Returns the ``adapter_config.json`` that loads the adapter onto the plain base model."""
    info = entry.adapters[name]
    config = {key: value for key, value in info.config.items() if key != "auto_mapping"}
    config["target_modules"], parameters = _as_peft_finds_them(part, info, config)
    if "target_parameters" in config:
        config["target_parameters"] = parameters or None
    if entry.quantization and loftq_settings(config) and not quantizes_another_base(config):
        # The codes are those of the loaded base, to which these factors are added.
        config |= {"init_lora_weights": True, "loftq_config": {}}
    for applied in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        config[applied] = None
    entries = saved_entries(part, saved_modules(part, entry, name), info.targets)
    config["modules_to_save"] = entries or None
    config["inference_mode"] = True
    config["base_model_name_or_path"] = entry.base_id["name_or_path"]
    config["revision"] = entry.base_id["revision"]
    for field in PATTERN_FIELDS:
        if config.get(field):
            config[field] = patterns_for(info.targets, config[field])
    if "fan_in_fan_out" in config:
        layers = [part.get_submodule(target) for target in info.targets]
        config["fan_in_fan_out"] = all(isinstance(layer, Conv1D) for layer in layers)
    return config


def _as_peft_finds_them(
    part: nn.Module, info: AdapterInfo, config: Mapping[str, Any]
) -> tuple[list[str] | str, list[str]]:
    """Returns ``target_modules`` and ``target_parameters`` by which PEFT adapts the layers."""
    experts = [name for name in info.targets if parameter_name(name) != name]
    apart = {*experts, *(projections(part, info.targets) if info.in_place else [])}
    layers = [name for name in info.targets if name not in apart]
    patterns = {**(config.get("rank_pattern") or {}), **(config.get("alpha_pattern") or {})}
    weights: list[str] = []
    if info.in_place and method_of(config).takes_experts(config_from_dict(info.config)):
        weights = taken_for_experts(part, layers)
    if patterns_for(weights, patterns):
        # PEFT compares them with other names then.
        weights = []
    parameters = [*map(parameter_name, experts), *(f"{name}.weight" for name in weights)]
    return shortest_suffixes([n for n in layers if n not in weights], part), parameters


def differences_in_peft(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> list[str]:
    """Returns why PEFT cannot read the files of an adapter to the same output; often nothing.

    This package reads them as they were meant.
    """
    fields = exported_config(part, entry, name)
    return [
        *replaced_under_one_name(part, entry.adapters[name].targets),
        *retargeted_by_peft(part, config_from_dict(fields)),
        *_computed_differently(part, entry, name),
    ]


def _computed_differently(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> Iterator[str]:
    info = entry.adapters[name]
    method = method_of(info.config)
    if not info.in_place or not isinstance(method, InPlaceMethod):
        return
    for target in info.targets:
        layer = part.get_submodule(target)
        reason = method.difference_in_peft(layer)
        if reason:
            yield f"{entry.qualified(target)} ({class_key(layer)[2].__name__}): {reason}"


@cache
def _versions() -> dict[str, str]:
    # Once: reading them takes longer than the rest of a small adapter.
    versions = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def provenance_of(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> dict[str, Any]:
    """The origin of the adapter: base, settings, versions, seed, time (UTC).

    The fingerprint of the base is that of all parameters but those in ``left_out``, which the
    files hold themselves.
    """
    saved = saved_modules(part, entry, name)
    replaced = [key.replace(".base_layer.", ".") for key in entry.replaced]
    left_out = [*saved, *replaced, *(key for key in entry.initial_values if not inside(key, saved))]
    return {
        "base": {
            **entry.base_id,
            "fingerprint": entry.loaded.only(lambda key: not inside(key, left_out)).digest(),
            "left_out": left_out,
            "part": entry.name,
        },
        "config": to_primitives(entry.adapters[name].config),
        "rows": to_primitives(entry.adapters[name].rows),
        "projection_scale": projection_scale(part, entry.adapters[name].targets),
        "modules_to_save": saved,
        "quantization": entry.quantization,
        "versions": dict(_versions()),
        "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def recorded_base(
    loaded: Fingerprint, facts: Mapping[str, Any], heads: Iterable[str]
) -> Fingerprint:
    """Returns the parameters of a base that the fingerprint in ``provenance.json`` covers.

    ``heads`` are left out where the file has no list of its own, as folders of older versions.
    """
    left_out = list((facts.get("base") or {}).get("left_out", heads))
    return loaded.only(lambda key: not inside(key, left_out))


def read_adapter(
    folder: Path, allow_diverged: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter folder without unpickling anything.

    Args:
        folder: The folder.
        allow_diverged: Read what :func:`diverged_tensors` names, too.

    Returns:
        The fields of ``adapter_config.json``, the tensors (keys without PEFT's prefix), and what
        ``provenance.json`` says, which only this package writes.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        shards = sorted(file.name for file in folder.glob("adapter_model-*.safetensors"))
        if shards:
            raise CheckpointError(
                f"{str(folder)!r} holds its weights in several files ({', '.join(shards[:3])}), "
                f"and PEFT reads one, {WEIGHTS_FILE}. Put their tensors into that one: "
                "safetensors.torch.save_file of what load_file gives for each."
            )
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
    fields = read_json(folder / CONFIG_FILE)
    if fields.get("peft_type") is None:
        raise CheckpointError(f"{str(folder / CONFIG_FILE)!r} does not say `peft_type`.")
    blob = weights.read_bytes()
    try:
        tensors = load(blob)
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(weights)!r} is not a complete safetensors file ({error}). It was cut short or "
            "is another format; nothing of it was executed."
        ) from error
    written = folder / PROVENANCE_FILE
    facts = read_json(written) if written.is_file() else {}
    if facts.get("adapter_sha256") not in (None, hashlib.sha256(blob).hexdigest()):
        raise CheckpointError(
            f"{str(weights)!r} is not the file that {PROVENANCE_FILE} next to it describes: its "
            "sha256 is another one. It was damaged or exchanged; remove provenance.json if you "
            "changed it on purpose."
        )
    diverged = diverged_tensors(fields, tensors)
    if diverged and not allow_diverged:
        raise CheckpointError(
            f"The adapter in {str(folder)!r} holds NaN or infinite values, with which the model "
            f"computes nothing else:{itemize(diverged, 5)}\nIt was saved after training diverged. "
            "Take an earlier checkpoint."
        )
    named = {_PREFIX.sub("", key): value for key, value in tensors.items()}
    return fields, {_DEFAULT_NAME.sub("", key): value for key, value in named.items()}, facts


def diverged_tensors(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the keys of factors that are not finite, and of others that hold NaN.

    Heads and buffers may be infinite on purpose, as masks are.
    """
    kind = fields.get("peft_type")
    prefixes: Mapping[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
    prefix = prefixes.get(kind) if isinstance(kind, str) else None

    def is_diverged(key: str, value: Tensor) -> bool:
        # float8 has no `isfinite` of its own.
        wide, is_factor = value.float(), prefix is not None and f".{prefix}" in key
        return bool((~wide.isfinite() if is_factor else wide.isnan()).any())

    floats = {key: value for key, value in tensors.items() if value.is_floating_point()}
    return [key for key, value in floats.items() if is_diverged(key, value)]


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file of an adapter folder."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{str(file)!r} holds no JSON object.")
    return fields

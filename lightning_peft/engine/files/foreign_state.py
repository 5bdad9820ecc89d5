"""Mapping of tensors with the names of PEFT's wrapper to a module."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_peft.engine.configuration import config_to_dict
from lightning_peft.engine.files.adapter_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lightning_peft.engine.files.adapter_loading import load_adapter
from lightning_peft.engine.files.base_tensors import include_in_files
from lightning_peft.engine.files.state_dicts import named_tensors
from lightning_peft.engine.injection import inject
from lightning_peft.engine.peft_wrappers import PeftWrapped, find_peft_wrapped
from lightning_peft.engine.record import record_of, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.engine.selection.scope import find_parts
from lightning_peft.errors import CheckpointError, itemize

_FACTOR = re.compile(
    r"(?P<layer>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_BEFORE_TRAINING = ".original_module."
_FIRST = re.compile(r"^(?:_forward_module\.|module\.)+(?=.)")


@dataclass
class ForeignState:
    """What is in the state dict of a checkpoint, by the names of a module.

    Attributes:
        factors: Low-rank factors by layer and kind, as ``("net.q", "lora_A")``.
        saved: Values of modules that PEFT trained in full, by module and name in it.
        rest: All other parameters and buffers that the module has.
        unmapped: Keys of the file that the module has no place for.
        names: Where the tensors are on the module, once it has adapters in place, by key.
    """

    factors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    saved: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)


@dataclass
class ForeignLoad:
    """What was loaded of a checkpoint that another program wrote.

    Attributes:
        adapters: Number of layers whose adapters were loaded.
        parts: Names of the parts that they are on.
        saved: Names of the modules that PEFT trained in full.
        base: Names of the frozen weights that differ from those the module was built with. The new
            files hold them.
        absent: Names of parameters that the file does not have, which are as they were built.
        unmapped: Keys of the file that the module has no place for.
        names: Where the tensors of the file are now, by their keys there.
    """

    adapters: int
    parts: list[str]
    saved: list[str]
    base: list[str]
    absent: list[str]
    unmapped: list[str]
    names: dict[str, str] = field(default_factory=dict)


def load_foreign_state(
    module: nn.Module,
    state: Mapping[str, Any],
    *,
    lora_alpha: float | Mapping[str, float] | None = None,
    use_rslora: bool = False,
    allow_unmapped: bool = False,
    hyperparameters: Mapping[str, Any] | None = None,
) -> ForeignLoad:
    """Loads a state dict with LoRA factors, written by PEFT in a LightningModule or by hand.

    Keys may be those of a whole module (``net.base_model.model...lora_A.default.weight``), or of
    adapters only, with and without the name of the adapter. Rank and layers follow from the
    tensors. Afterwards the module has the adapters in place, trainable.

    Args:
        module: The module without adapters, or with those of ``peft.get_peft_model``.
        state: Tensors by key.
        lora_alpha: The scale in training, for all layers or by the submodule that they are in; not
            needed where the module itself wraps its layers.
        use_rslora: Whether the scale was ``lora_alpha / sqrt(r)``.
        allow_unmapped: Leave out keys that the module has no place for.
        hyperparameters: Those of the file, which may have the scale.

    Raises:
        CheckpointError: If there are no factors, or keys without a place, or tensors that do not
            fit, or the scale is not known, or not that of the module; all are named.
    """
    wrapped = find_peft_wrapped(module)
    if not wrapped:
        saved = hyperparameters or {}
        lora_alpha = saved.get("lora_alpha") if lora_alpha is None else lora_alpha
        settings = {"use_rslora": use_rslora or bool(saved.get("use_rslora"))}
    else:
        settings = _settings_of(wrapped[0], lora_alpha, use_rslora)
        lora_alpha = settings["lora_alpha"]
        _load_buffers(module, state)
        inject(module)
    found = sort_foreign_state(module, state)
    _check(module, found, lora_alpha, allow_unmapped)
    differing = _load_rest(module, found.rest)
    alphas = _alphas([layer for layer, _ in found.factors], lora_alpha)
    groups = _by_part(module, found)
    for part, layers in groups.items():
        scales = {layer: alphas[layer] for layer in layers}
        with tempfile.TemporaryDirectory() as folder:
            _write_folder(Path(folder), part, scales, found, settings)
            load_adapter(module, folder, adapt=part, is_trainable=True)
    known = {*found.rest, *(f"{name}.{leaf}" for name, leaf in found.saved)}
    base = [name for name in differing if name in require_record(module).frozen]
    _keep_in_files(module, base)
    return ForeignLoad(
        adapters=len({layer for layer, _ in found.factors}),
        parts=list(groups),
        saved=sorted({name for name, _ in found.saved}),
        base=base,
        absent=[n for n in named_tensors(module) if n not in known and "lora_" not in n],
        unmapped=found.unmapped,
        names=found.names,
    )


def _settings_of(
    wrapped: PeftWrapped, lora_alpha: float | Mapping[str, float] | None, use_rslora: bool
) -> dict[str, Any]:
    """Returns the settings of a module that wraps its layers."""
    fields = config_to_dict(wrapped.config)
    asked = lora_alpha.values() if isinstance(lora_alpha, Mapping) else [lora_alpha]
    problems = []
    if any(alpha not in (None, fields["lora_alpha"]) for alpha in asked):
        problems.append(f"lora_alpha={lora_alpha} is given, the module has {fields['lora_alpha']}")
    if use_rslora and not fields["use_rslora"]:
        problems.append("use_rslora is given, the module has lora_alpha / r")
    if problems:
        raise CheckpointError(
            "The module wraps its layers with a scale of its own, and another one was asked for:"
            + itemize(problems)
            + "\nLeave it out, or build the module as the run that wrote the file did."
        )
    names = ("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "r")
    return {name: fields[name] for name in names}


def _keep_in_files(module: nn.Module, base: list[str]) -> None:
    for entry in require_record(module).parts.values():
        prefix = f"{entry.name}." if entry.name else ""
        names = [n.removeprefix(prefix) for n in base if inside(n, [entry.name]) or not prefix]
        if names:
            include_in_files(module, entry, names)


def _alphas(
    layers: list[str], lora_alpha: float | Mapping[str, float] | None
) -> dict[str, float | None]:
    """Returns the scale of each layer: that of the submodule named last above it."""
    if not isinstance(lora_alpha, Mapping):
        return dict.fromkeys(layers, lora_alpha)
    above = {layer: [n for n in lora_alpha if inside(layer, [n])] for layer in layers}
    unknown = [layer for layer, names in above.items() if not names]
    if unknown:
        raise CheckpointError(
            f"lora_alpha is given for {', '.join(map(repr, lora_alpha))}, and not for:"
            + itemize(unknown, 5)
        )
    return {layer: lora_alpha[max(names, key=len)] for layer, names in above.items()}


def sort_foreign_state(module: nn.Module, state: Mapping[str, Any]) -> ForeignState:
    """Returns the tensors of a state dict by what they are and by the names of ``module``."""
    own, modules = named_tensors(module), dict(module.named_modules(remove_duplicate=False))
    found, adapters = ForeignState(), Counter[str]()
    for key, value in state.items():
        if not isinstance(value, Tensor) or _BEFORE_TRAINING in key:
            continue
        for name in _plain_names(key):
            factor, saved = _FACTOR.fullmatch(name), _SAVED.fullmatch(name)
            if factor and factor["layer"] in modules:
                adapters[factor["adapter"] or "default"] += 1
                found.factors[factor["layer"], factor["kind"]] = value
                found.names[key] = _live_name(factor["layer"], factor["kind"])
                break
            if saved and saved["module"] in modules:
                found.saved[saved["module"], saved["leaf"]] = value
                found.names[key] = f"{saved['module']}.{saved['leaf']}"
                break
            if name in own and own[name].shape == value.shape:
                found.rest[name] = value
                found.names[key] = name
                break
        else:
            found.unmapped.append(key)
    if len(adapters) > 1:
        raise CheckpointError(
            f"The file holds several adapters ({', '.join(adapters)}), and one is imported. Save "
            "them as PEFT folders, and load each by lightning_peft.load_adapter."
        )
    return found


def _live_name(layer: str, kind: str) -> str:
    """Returns the name of a factor on a module with adapters in place."""
    return f"{layer}.{kind}.default" + ("" if "embedding" in kind else ".weight")


def _plain_names(key: str) -> Iterator[str]:
    """Yields what a key may be called in the module: as it is, and without PEFT's wrapper."""
    for start in (key, _FIRST.sub("", key)):
        name = start.replace("_orig_mod.", "").replace(".base_layer.", ".")
        yield name
        if "base_model.model." in name:
            yield name.replace("base_model.model.", "", 1)


def _check(module: nn.Module, found: ForeignState, lora_alpha: Any, allow_unmapped: bool) -> None:
    if not found.factors:
        raise CheckpointError(
            f"The file holds no LoRA factors (lora_A, lora_B) for a layer of "
            f"{type(module).__name__}. Its keys without a place there:"
            + itemize(found.unmapped, 5)
            + "\nA full checkpoint without adapters is loaded by load_from_checkpoint, and its "
            "module given to the Trainer."
        )
    if lora_alpha is None:
        raise CheckpointError(
            "The scale of the adapters is not in the file: pass the lora_alpha of the run that "
            "wrote it. With another value the model computes something else."
        )
    if found.unmapped and not allow_unmapped:
        raise CheckpointError(
            f"{type(module).__name__} has no place for these keys of the file, by name or by shape:"
            + itemize(found.unmapped)
            + "\nBuild the module as the run did, or pass --allow-unmapped to leave them out."
        )


@torch.no_grad()
def _load_buffers(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads buffers before adapters are taken over, which counts later changes as training's."""
    for name, buffer in module.named_buffers():
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape == buffer.shape:
            buffer.copy_(value)


@torch.no_grad()
def _load_rest(module: nn.Module, rest: Mapping[str, Tensor]) -> list[str]:
    """Copies values in, and returns the names of those that were others."""
    own, differing = named_tensors(module), []
    for name, value in rest.items():
        mine = own[name]
        if not torch.equal(mine.cpu(), value.to(mine.dtype).cpu()):
            mine.copy_(value)
            differing.append(name)
    return differing


def _by_part(module: nn.Module, found: ForeignState) -> dict[str, list[str]]:
    """Returns the layers with factors by the part of the module that they are in."""
    record = record_of(module)
    parts = list(find_parts(module) if record is None else record.parts)
    groups: dict[str, list[str]] = {}
    for layer in dict.fromkeys(layer for layer, _ in found.factors):
        owners = [part for part in parts if not part or layer.startswith(f"{part}.")]
        groups.setdefault(owners[0] if owners else layer.partition(".")[0], []).append(layer)
    return groups


def _write_folder(
    folder: Path,
    part: str,
    layers: Mapping[str, float | None],
    found: ForeignState,
    settings: Mapping[str, Any],
) -> None:
    """Writes the adapter of one part as PEFT would have."""
    prefix = f"{part}." if part else ""
    tensors = {
        f"{PREFIX}{layer.removeprefix(prefix)}.{kind}"
        + (".weight" if kind in ("lora_A", "lora_B") else ""): value.contiguous()
        for (layer, kind), value in found.factors.items()
        if layer in layers
    }
    saved = {name for name, _ in found.saved if name.startswith(prefix)}
    tensors |= {
        f"{PREFIX}{name.removeprefix(prefix)}.{leaf}": value.contiguous()
        for (name, leaf), value in found.saved.items()
        if name in saved
    }
    ranks = {
        layer.removeprefix(prefix): value.shape[0]
        for (layer, kind), value in found.factors.items()
        if layer in layers and kind in ("lora_A", "lora_embedding_A")
    }
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    scales = {layer.removeprefix(prefix): alpha for layer, alpha in layers.items()}
    alpha = Counter(scales.values()).most_common(1)[0][0]
    fields = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha,
        "alpha_pattern": {re.escape(n): value for n, value in scales.items() if value != alpha},
        "use_dora": any(kind == "lora_magnitude_vector" for _, kind in found.factors),
        "target_modules": "|".join(re.escape(layer.removeprefix(prefix)) for layer in layers),
        "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != usual},
        "modules_to_save": sorted(name.removeprefix(prefix) for name in saved) or None,
        **settings,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")
    save_file({key: value.clone() for key, value in tensors.items()}, folder / WEIGHTS_FILE)

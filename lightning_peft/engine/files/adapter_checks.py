"""Compatibility checks between an adapter folder and its base, and mapping of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_peft.compat.transformers import (
    WeightRenaming,
    rename_source_key,
    weight_conversions,
)
from lightning_peft.engine.configuration import config_differences
from lightning_peft.engine.files.adapter_format import (
    adapter_tensors,
    exported_config,
    recorded_base,
)
from lightning_peft.engine.files.base_tensors import base_tensors, differences
from lightning_peft.engine.files.state_dicts import tensor_problems
from lightning_peft.engine.fingerprint import Fingerprint, checksum
from lightning_peft.engine.injection import ATTENTIONS, EXPERTS
from lightning_peft.engine.layers.attention import projection_scale, scale_problem
from lightning_peft.engine.layers.lora import only_rows
from lightning_peft.engine.methods.registry import method_of
from lightning_peft.engine.record import AdaptedModuleRecord
from lightning_peft.engine.selection.parameters import expert_weights
from lightning_peft.engine.selection.parts import inside, matches_suffix
from lightning_peft.engine.selection.targets import PATTERN_FIELDS, all_names
from lightning_peft.errors import BaseMismatchError, CheckpointError, itemize

_WITHIN_WRAPPERS = (
    re.compile(r"\.original_module\."),
    re.compile(r"\.modules_to_save\."),
    re.compile(r"\.modules_to_save\.[^.]+\."),
)
# What is added to a layer of the base, behind its name.
_PREFIXES = sorted({*PEFT_TYPE_TO_PREFIX_MAPPING.values()})
_ADDED = re.compile(rf"\.(?:{'|'.join(_PREFIXES)}|token_adapter\.|base_layer\.).*")
# Of torch.compile, FSDP and activation checkpointing.
_TRAINING_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass
class AdapterFolder:
    """One adapter folder, and what of it fits the part that it is for.

    Attributes:
        path: The folder.
        part: Name of the part.
        fields: Fields of ``adapter_config.json``.
        tensors: By their keys without PEFT's prefix.
        facts: The content of ``provenance.json``.
    """

    path: Path
    part: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def saved(self) -> list[str]:
        """Names of the modules that it holds in full."""
        return self.fields["modules_to_save"] or []


def experts_were_dense(facts: Mapping[str, Any], kind: str = EXPERTS) -> bool:
    """Whether an adapter was trained on a base that was quantized without its experts, if any.

    Versions before weights of experts (or of attentions) could be quantized record nothing of them.
    """
    return bool(facts.get("quantization")) and not (facts.get("base") or {}).get(kind)


def check_base_of(module: nn.Module, folder: AdapterFolder, entry: AdaptedModuleRecord) -> None:
    """Refuses a base other than the one that a folder records."""
    base = folder.facts.get("base") or {}
    loaded = _as_they_are(module.get_submodule(entry.name), entry)
    mine = recorded_base(loaded, folder.facts, [*folder.saved, *entry.heads]).digest()
    if base.get("fingerprint") not in (None, mine):
        raise BaseMismatchError(
            f"The adapter in {str(folder.path)!r} was trained on another base"
            f" ({base.get('name_or_path') or 'fingerprint ' + base['fingerprint'][:12]}) than "
            f"{entry.base_id.get('name_or_path') or 'this module'} "
            f"(fingerprint {mine[:12]}). On this one it would compute something "
            "else. Load the base it was trained on, or pass check_base=False if they are meant "
            "to differ."
        )
    # In other bits, all of the base is another one, which callers ask for.
    alike = folder.facts.get("quantization") == entry.quantization
    for kind, called in ((EXPERTS, "experts"), (ATTENTIONS, "attentions")):
        recorded, now = bool(base.get(kind)), bool(entry.base_id.get(kind))
        if recorded != now and (alike or (now and experts_were_dense(folder.facts, kind))):
            raise BaseMismatchError(
                f"The adapter in {str(folder.path)!r} was trained on a quantized base with "
                f"{stored_as(recorded)} {called}, and the {called} of "
                f"{entry.name or 'this module'} are {stored_as(now)}. Load it first, or alone: a "
                "module without adapters is quantized as the first one records. "
                "check_base=False loads it all the same."
            )


def stored_as(as_codes: bool) -> str:
    """What experts are called in messages, by whether their weights are codes."""
    return "quantized" if as_codes else "dense"


def _as_they_are(part: nn.Module, entry: AdaptedModuleRecord) -> Fingerprint:
    """Returns the fingerprint of all parameters, with heads as they are by now."""
    state = dict(part.named_parameters())
    now = {
        name: (shape, checksum(state[name]))
        for name, (shape, _) in entry.loaded.tensors.items()
        if name in state and inside(name, entry.heads) and state[name].is_floating_point()
    }
    return Fingerprint({**entry.loaded.tensors, **now})


def check_fit(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, folder: AdapterFolder
) -> list[str]:
    """Refuses a folder that does not fit; returns the base weights that it has other values for."""
    fields, tensors = folder.fields, folder.tensors
    mine = exported_config(part, entry, name)
    scale = projection_scale(part, entry.adapters[name].targets)
    # The values before training do not matter, and files may leave fields out.
    compared = {key: value for key, value in fields.items() if key in mine}
    compared["init_lora_weights"] = mine.get("init_lora_weights")
    problems = [
        f"{key}={fields[key]!r} in the file and {mine[key]!r} in the module"
        for key in config_differences({k: mine[k] for k in compared if k in mine}, compared)
        if key != "modules_to_save"
    ]
    expected = adapter_tensors(part, entry, name, {*folder.saved, *entry.saved})
    brought = base_tensors(part, entry, [key for key in tensors if key not in expected])
    replaced, unusable = differences(entry, brought, tensors, name)
    problems += tensor_problems(
        expected, {key: value for key, value in tensors.items() if key not in brought}, "file"
    )
    problems += [
        f"{key}: {_dtype(tensors[key])} in the file, {_dtype(value)} in the module"
        for key, value in expected.items()
        if key in tensors and tensors[key].is_floating_point() != value.is_floating_point()
    ]
    problems += unusable + _tie_problems(part, tensors)
    problems += scale_problem(folder.facts.get("projection_scale"), scale)
    # Rows are of layers whose tensors fit.
    problems = problems or [
        f"{target}: the adapter in the module is for the rows {rows}, and the file has more"
        for target, rows in entry.adapters[name].rows.items()
        for b in [tensors[f"{target}.lora_B.weight"]]
        if not torch.equal(only_rows(b, rows), b)
    ]
    if problems:
        raise CheckpointError(
            f"The adapter in {str(folder.path)!r} does not fit {type(part).__name__}:"
            + itemize(problems)
        )
    return replaced


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tie_problems(part: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """PEFT trains copies of tied modules apart; one tensor cannot take two values."""
    first: dict[int, str] = {}
    problems = []
    names = {key.replace(".base_layer.", "."): key for key in tensors}
    for name, param in part.named_parameters(remove_duplicate=False):
        key = names.get(name.replace(".base_layer.", "."))
        if key is not None:
            other = first.setdefault(id(param), key)
            if not torch.equal(tensors[key], tensors[other]):
                problems.append(
                    f"{key} and {other} have different values in the file and are tied in the "
                    "module: untie them (tie_word_embeddings=False)"
                )
    return problems


def fields_for(part: nn.Module, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a folder without names that match nothing in ``part``.

    PEFT passes over them. That all tensors of the file have a place is checked later.
    """
    known = all_names(part)
    names = [alias for aliases in known.values() for alias in aliases]
    # Here experts have no layers yet.
    adapted = [*names, *expert_weights(part, known)]

    def steps(entry: str) -> bool:
        return any(matches_suffix(entry, name) for name in names)

    def ends(entry: str) -> bool:
        return any(name.endswith(entry) for name in names)

    def pattern(entry: str) -> bool:
        try:
            return any(re.match(rf"(.*\.)?({entry})$", name) for name in adapted)
        except re.error:
            # Named in an error later.
            return True

    kept = dict(fields)
    if "trainable_token_indices" in kept:
        # PEFT writes an empty list for none.
        kept["trainable_token_indices"] = kept["trainable_token_indices"] or None
    if fields.get("peft_type") == "LORA":
        # To PEFT the word for all linear layers means no weights of experts.
        kept["target_parameters"] = kept.get("target_parameters") or []
        if kept["target_parameters"] and kept.get("target_modules") is None:
            # So it writes that it adapts no layer.
            kept["target_modules"] = []
    for field, matches in (("target_modules", steps), ("exclude_modules", steps)):
        if isinstance(kept.get(field), list):
            # Where none is left, the error is about the names in the file.
            kept[field] = [entry for entry in kept[field] if matches(entry)] or kept[field]
    if isinstance(kept.get("exclude_modules"), list) and not any(
        map(steps, kept["exclude_modules"])
    ):
        kept["exclude_modules"] = None
    if isinstance(kept.get("modules_to_save"), list):
        kept["modules_to_save"] = [entry for entry in kept["modules_to_save"] if ends(entry)]
    for field in PATTERN_FIELDS:
        if isinstance(kept.get(field), dict):
            kept[field] = {key: value for key, value in kept[field].items() if pattern(key)}
    return kept


def check_ranks(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuses ranks of which the file has no tensor, before memory is allocated for them."""
    sizes = [size for value in tensors.values() for size in value.shape]
    largest = max(method_of(fields).ranks(fields), default=0)
    if largest > max(sizes, default=0):
        raise CheckpointError(
            f"adapter_config.json says r={largest}, and no tensor of the file is that large: its "
            f"dimensions end at {max(sizes, default=0)}."
        )


def without_wrappers(part: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors without the names of what wrapped layers in training, and not here."""
    here = {step for name, _ in part.named_modules() for step in name.split(".")}
    gone = [f"{name}." for name in _TRAINING_WRAPPERS if name not in here]
    inside = re.compile("|".join(map(re.escape, gone)) or "$")
    return {inside.sub("", key): value for key, value in tensors.items()}


def with_new_names(part: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors by the names that transformers gives layers by now, as to its own files.

    Models of text and images had their layers elsewhere before transformers 4.52.
    """
    modules = {name for name, _ in part.named_modules(remove_duplicate=False)}
    named = (part.named_parameters(remove_duplicate=False), part.named_buffers())
    values = {key for pairs in named for key, _ in pairs}

    def is_here(key: str) -> bool:
        layer = _ADDED.sub("", key)
        return key in values if layer == key else layer in modules

    old = [key for key in tensors if not is_here(key)]
    if not old or not isinstance(part, PreTrainedModel):
        return dict(tensors)
    renamings = [one for one in weight_conversions(part) if isinstance(one, WeightRenaming)]
    renamed = {}
    for key in old:
        layer = _ADDED.sub("", key)
        # Renamings are of keys of values, and may look at their ends.
        ending = "" if layer == key else ".weight"
        new = rename_source_key(f"{layer}{ending}", renamings, [])[0].removesuffix(ending)
        renamed[key] = new + key.removeprefix(layer)
    # Only where it names a layer; what does not is listed as unexpected.
    found = {key: new for key, new in renamed.items() if is_here(new) and new not in tensors}
    return {found.get(key, key): value for key, value in tensors.items()}


def without_repeated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a file without what it has again under names of PEFT's wrappers.

    With ``bias="all"`` PEFT writes biases of ``modules_to_save`` up to three times.
    """
    repeated = {
        key
        for key in tensors
        for within in _WITHIN_WRAPPERS
        if within.search(key) and within.sub(".", key) in tensors
    }
    return {key: value for key, value in tensors.items() if key not in repeated}


def _refuse_nested(hits: list[str]) -> None:
    nested = [name for name in hits if inside(name, [up for up in hits if up != name])]
    if nested:
        raise CheckpointError(
            "PEFT wrapped modules inside of others that it saves too, and such a file has lost "
            "which of their values were trained (PEFT cannot load it either):"
            + itemize(nested, 5)
            + "\nEach entry of `modules_to_save` is the end of a name. Train again with entries "
            "that match only the outer or only the inner modules."
        )


def saved_in_file(
    part: nn.Module,
    entries: Iterable[str],
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """Returns the names of the modules that a file holds in full.

    ``entries`` are ``modules_to_save`` of the file; ``provenance.json`` names the modules exactly.
    """
    names = all_names(part)
    recorded = facts.get("modules_to_save")
    if recorded is not None:
        absent = [name for name in recorded if name not in names]
        if absent:
            raise CheckpointError(
                f"The adapter was saved with modules that {type(part).__name__} does not have:"
                + itemize(absent)
            )
        return list(recorded)
    # Keys of adapters are others on a part: they have the adapter's name in them.
    own = part.state_dict()
    owners = {key.rpartition(".")[0] for key in tensors if key in own}
    hits = []
    for name, known in names.items():
        steps = any(a == e or a.endswith(f".{e.lstrip('.')}") for a in known for e in entries)
        ends = any(a.endswith(e) for a in known for e in entries)
        # By its last steps, a name is meant; by its letters only where the file has its values.
        has_values = steps and bool(part.get_submodule(name).state_dict())
        if has_values or (ends and any(inside(owner, [name]) for owner in owners)):
            hits.append(name)
    _refuse_nested(hits)
    return hits

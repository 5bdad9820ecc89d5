"""Compatibility checks between an adapter folder and its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.configuration import config_differences
from lightning_peft.engine.files.adapter_format import (
    adapter_tensors,
    exported_config,
    recorded_base,
)
from lightning_peft.engine.files.base_tensors import base_tensors, differences
from lightning_peft.engine.files.state_dicts import tensor_problems
from lightning_peft.engine.fingerprint import Fingerprint, checksum
from lightning_peft.engine.injection import EXPERTS
from lightning_peft.engine.layers.attention import projection_scale, scale_problem
from lightning_peft.engine.layers.lora import only_rows
from lightning_peft.engine.record import AdaptedModuleRecord
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import BaseMismatchError, CheckpointError, itemize


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


def experts_were_dense(facts: Mapping[str, Any]) -> bool:
    """Whether an adapter was trained on a base that was quantized without its experts, if any.

    Versions before weights of experts could be quantized record nothing of them.
    """
    return bool(facts.get("quantization")) and not (facts.get("base") or {}).get(EXPERTS)


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
    recorded, now = bool(base.get(EXPERTS)), bool(entry.base_id.get(EXPERTS))
    # In other bits, all of the base is another one, which callers ask for.
    alike = folder.facts.get("quantization") == entry.quantization
    if recorded != now and (alike or (now and experts_were_dense(folder.facts))):
        raise BaseMismatchError(
            f"The adapter in {str(folder.path)!r} was trained on a quantized base with "
            f"{stored_as(recorded)} experts, and the experts of {entry.name or 'this module'} are "
            f"{stored_as(now)}. Load it first, or alone: a module without adapters is quantized as "
            "the first one records. check_base=False loads it all the same."
        )


def stored_as(as_codes: bool) -> str:
    """What experts are called in messages, by whether their weights are codes."""
    return "quantized" if as_codes else "dense"


def _as_they_are(part: nn.Module, entry: AdaptedModuleRecord) -> Fingerprint:
    """Returns the fingerprint of all parameters, with heads as they are by now."""
    state = dict(part.named_parameters())
    now = {
        name: checksum(state[name])
        for name in entry.loaded.names
        if name in state and inside(name, entry.heads) and state[name].is_floating_point()
    }
    loaded = entry.loaded
    sums = [now.get(n, total) for n, total in zip(loaded.names, loaded.sums, strict=True)]
    return Fingerprint(loaded.names, loaded.shapes, tuple(sums))


def check_fit(
    part: nn.Module, entry: AdaptedModuleRecord, name: str, folder: AdapterFolder
) -> list[str]:
    """Refuses a folder that does not fit an adapter.

    Returns:
        The names of weights of the base that the folder brings with other values.
    """
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

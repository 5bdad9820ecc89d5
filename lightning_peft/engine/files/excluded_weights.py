"""Frozen weights outside of the adapted parts that checkpoints leave out.

Such a weight comes back with the module, as the frozen base does, if the constructor loads it
again. That follows where a file of the model that it belongs to holds the same values. Of anything
else, such as random values, only the user can know it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_peft.compat.transformers import origin_of
from lightning_peft.engine.files.state_dicts import checkpoint_tensors
from lightning_peft.engine.fingerprint import checksum, exact_checksum
from lightning_peft.engine.record import ExcludedWeight, require_record
from lightning_peft.engine.selection.parts import inside, is_pretrained
from lightning_peft.errors import BaseMismatchError, ConfigError, itemize, similar_names

log = logging.getLogger(__name__)

_Content = tuple[tuple[int, ...], torch.dtype, int]


def note_excluded(module: nn.Module, asked: str | Iterable[str] | None = None) -> None:
    """Notes which frozen weights outside of the adapted parts checkpoints leave out, and as what.

    Args:
        module: A module with adapters, with the weights that its constructor gave it.
        asked: Names of submodules; ``None`` means the weights in eval mode of pretrained models
            whose values are in a safetensors file of that model on this machine.

    Raises:
        ConfigError: If a name is not a submodule, or of one that trains or that adapters need.
    """
    record = require_record(module)
    weights = _frozen_outside(module)
    if asked is None:
        record.excluded = _weights_in_files(module, weights)
        return
    names = [asked] if isinstance(asked, str) else list(asked)
    _check_names(module, weights, names)
    record.excluded = {
        # Noted in an earlier fit, nearer to the constructor.
        name: record.excluded.get(name) or _noted(weight)
        for name, weight in weights.items()
        if inside(name, names)
    }


def excluded_weights(module: nn.Module) -> dict[str, int]:
    """Returns the checksums of the weights that a checkpoint written now leaves out, by name.

    Those that changed since they were noted are in the file.
    """
    record = require_record(module)
    params = dict(module.named_parameters(remove_duplicate=False))
    same = {
        name: noted.total
        for name, noted in record.excluded.items()
        if name in params and _is_unchanged(params[name], noted)
    }
    changed = [name for name in record.excluded if name not in {*same, *record.changed}]
    if changed:
        record.changed |= {*changed}
        log.warning(
            "These frozen weights are not those that the module was built with any more, so that "
            "checkpoints hold them:%s",
            itemize(changed, 5),
        )
    return same


def check_excluded(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Checks that the weights a checkpoint leaves out are in ``module``.

    Raises:
        BaseMismatchError: If one is missing or another one; they are named.
    """
    params = dict(module.named_parameters(remove_duplicate=False))
    found = [
        name
        for name, total in zip(saved["names"], saved["sums"], strict=True)
        if name not in params or checksum(params[name]) != int(total)
    ]
    if found:
        raise BaseMismatchError(
            "The checkpoint leaves out frozen weights that the module loads itself, and these are "
            "not the ones of the run that wrote it:"
            + itemize(found, 5)
            + "\nBuild the module as in that run: the same files and revisions and, for random "
            "weights, the same seed. What was loaded after the constructor has to be loaded again "
            "first. With exclude_from_checkpoint=[] later checkpoints hold all of them."
        )


def _frozen_outside(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the frozen parameters besides the base and what checkpoints must hold, by name."""
    params = dict(module.named_parameters(remove_duplicate=False))
    taken = {*require_record(module).frozen, *checkpoint_tensors(module)}
    ids = {id(params[name]) for name in taken if name in params}
    return {
        name: param
        for name, param in params.items()
        if id(param) not in ids and not param.requires_grad and not param.is_meta
    }


def _check_names(module: nn.Module, weights: Mapping[str, Any], names: list[str]) -> None:
    known = dict(module.named_modules(remove_duplicate=False))
    served = {*weights, *require_record(module).frozen}
    problems = []
    for name in names:
        if name not in known:
            hint = similar_names(name, known)
            problems.append(f"{name!r} is not a submodule of {type(module).__name__}{hint}")
            continue
        params = module.named_parameters(remove_duplicate=False)
        others = [key for key, _ in params if inside(key, [name]) and key not in served]
        if others:
            problems.append(
                f"{name!r}: {len(others)} of its tensors train, or belong to the files of adapters "
                f"as heads do, such as {others[0]!r}"
            )
    if problems:
        raise ConfigError(
            "`exclude_from_checkpoint` does not fit the module:"
            + itemize(problems)
            + "\nName submodules that are frozen (requires_grad_(False)) before adapters are added."
        )


def _weights_in_files(
    module: nn.Module, weights: Mapping[str, nn.Parameter]
) -> dict[str, ExcludedWeight]:
    found: dict[str, ExcludedWeight] = {}
    for root, model in module.named_modules():
        origin, revision = origin_of(getattr(model, "config", None))
        if origin is None or not is_pretrained(model):
            continue
        noted = {
            name: (tuple(weight.shape), _noted(weight))
            for name, weight in weights.items()
            if inside(name, [root])
            and name not in found
            and not module.get_submodule(name.rpartition(".")[0]).training
        }
        files = _weight_files(origin, revision) if noted else []
        contents = {name: (shape, one.dtype, one.exact) for name, (shape, one) in noted.items()}
        stored = _contents(files, contents.values())
        found |= {name: noted[name][1] for name, one in contents.items() if one in stored}
    return found


def _weight_files(origin: str, revision: str | None) -> list[Path]:
    """Returns the safetensors files of a model on this machine, also of models next to it."""
    folder = Path(origin)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(origin, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return []
    return [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]


def _contents(files: Iterable[Path], wanted: Iterable[_Content]) -> set[_Content]:
    """Returns shape, dtype and exact checksum of the tensors of files, where shapes are wanted.

    Each in the dtypes in which a tensor of that shape is wanted: models cast when they load.
    """
    dtypes = defaultdict(set)
    for shape, dtype, _ in wanted:
        dtypes[shape].add(dtype)
    found: set[_Content] = set()
    for path in files:
        # One that is being written, or damaged, proves nothing.
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                shape = tuple(file.get_slice(key).get_shape())
                for dtype in dtypes.get(shape, ()):
                    found.add((shape, dtype, exact_checksum(file.get_tensor(key).to(dtype))))
    return found


def _noted(weight: nn.Parameter) -> ExcludedWeight:
    return ExcludedWeight(checksum(weight), exact_checksum(weight), weight.dtype)


def _is_unchanged(weight: nn.Parameter, noted: ExcludedWeight) -> bool:
    if weight.dtype == noted.dtype:
        return exact_checksum(weight) == noted.exact
    # Cast since, by a precision plugin.
    return checksum(weight) == noted.total

"""Frozen weights outside of the adapted parts that checkpoints exclude.

Such a weight comes back with the module, as the frozen base does, if the constructor loads it
again. That follows where the file that it is loaded from holds the same values. Of anything else,
such as random values, only the user can know it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_peft.compat.transformers import origin_of
from lightning_peft.engine.files.state_dicts import checkpoint_tensors, same_memory
from lightning_peft.engine.fingerprint import checksum, exact_checksum
from lightning_peft.engine.gathering import gathered
from lightning_peft.engine.record import BuiltWeight, require_record
from lightning_peft.engine.selection.parts import inside, is_pretrained
from lightning_peft.errors import BaseMismatchError, ConfigError, itemize, similar_names

log = logging.getLogger(__name__)


def note_excluded(module: nn.Module, asked: str | Iterable[str] | None = None) -> None:
    """Notes which frozen weights outside of the adapted parts checkpoints leave out, and as what.

    Args:
        module: A module with adapters, with the weights that its constructor gave it.
        asked: Names of submodules; ``None`` means the weights in eval mode of pretrained models
            whose values are in the safetensors file on this machine that they are loaded from.

    Raises:
        ConfigError: If a name is not a submodule, or of one that trains or that adapters need.
    """
    record = require_record(module)
    weights = _frozen_outside(module)
    if asked is None:
        found = _weights_in_files(module, weights)
        record.built |= found
        record.excluded = {*found}
        return
    names = [asked] if isinstance(asked, str) else list(asked)
    _check_names(module, weights, names)
    record.excluded = {name for name in weights if inside(name, names)}
    for name in weights:
        if name in record.excluded and name not in record.built:
            record.built[name] = _noted(weights[name])


def agree_on_excluded(
    module: nn.Module, processes: int, asked: str | Iterable[str] | None = None
) -> None:
    """Leaves out what is the same in all processes; called in all of them.

    Raises:
        BaseMismatchError: If a weight that was ``asked`` for by :func:`note_excluded` differs.
    """
    record = require_record(module)
    mine = {n: built for n, built in record.built.items() if n in record.excluded}
    everyone = gathered(mine, processes)
    names = dict.fromkeys(name for one in everyone for name in one)
    others = [name for name in names if len({one.get(name) for one in everyone}) > 1]
    if others and asked:
        raise BaseMismatchError(
            "`exclude_from_checkpoint` names weights that are not the same in all processes:"
            + itemize(others, 5)
            + "\nNo checkpoint would have them. Load the same files in every process, or call "
            "seed_everything(...) before a module with random weights is built. With "
            "exclude_from_checkpoint=[] checkpoints hold those of the first process."
        )
    record.excluded -= {*others}


def excluded_weights(module: nn.Module) -> dict[str, BuiltWeight]:
    """Returns the weights that a checkpoint written now leaves out, by name.

    Those that changed since they were noted are in the file.
    """
    record = require_record(module)
    params = dict(module.named_parameters(remove_duplicate=False))
    same = {
        name: built
        for name, built in record.built.items()
        if name in record.excluded and name in params and _is_unchanged(params[name], built)
    }
    changed = [n for n in record.built if n in record.excluded - record.changed - {*same}]
    if changed:
        record.changed |= {*changed}
        log.warning(
            "These frozen weights are not those that the module was built with any more, so that "
            "checkpoints hold them:%s",
            itemize(changed, 5),
        )
    return same


def excluded_tensors(module: nn.Module, saved: Mapping[str, BuiltWeight]) -> dict[str, Tensor]:
    """Returns the weights that a checkpoint leaves out, where ``module`` has them, by name.

    It has what the files of its models hold too, such as the values from before the weights were
    unfrozen: these are put into it.
    """
    params = dict(module.named_parameters(remove_duplicate=False))

    def put_back(name: str, value: Tensor) -> bool:
        value = value.to(saved[name].dtype)
        if value.shape != params[name].shape or exact_checksum(value) != saved[name].exact:
            return False
        params[name].data.copy_(value)
        return True

    others = [n for n, one in saved.items() if n in params and not _is_same(params[n], one)]
    _find_in_files(module, others, put_back)
    others = [name for name in others if not _is_same(params[name], saved[name])]
    return {n: params[n].detach() for n in saved if n in params and n not in others}


def check_excluded(
    module: nn.Module, saved: Mapping[str, BuiltWeight], state: Mapping[str, Any]
) -> None:
    """Checks that the weights a checkpoint leaves out are in ``module``.

    But for those that hooks of the module put into ``state``, which is loaded.

    Raises:
        BaseMismatchError: If one is missing or another one; they are named.
    """
    params = dict(module.named_parameters(remove_duplicate=False))
    found = [
        name
        for name, weight in saved.items()
        if (name not in state or same_memory(state[name], params.get(name)))
        and not (name in params and _is_same(params[name], weight))
    ]
    if found:
        built = require_record(module).built
        here = any(built.get(name) == saved[name] for name in found)
        raise BaseMismatchError(
            "The checkpoint leaves out frozen weights that the module loads itself, and these are "
            "not the ones of the run that wrote it:"
            + itemize(found, 5)
            + ("\nThey changed in this process since the module was built." if here else "")
            + "\nBuild the module as in that run: the same files and revisions and, for random "
            "weights, the same seed. What was loaded after the constructor has to be loaded again "
            "first. With exclude_from_checkpoint=[] later checkpoints hold all of them."
        )


def note_replaced(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Notes the weights in whose place those of ``state`` are about to be loaded.

    So that files that are written later hold the ones of ``state``.
    """
    built = require_record(module).built
    for name, weight in _outside(module).items():
        value = state.get(name)
        if name in built or not isinstance(value, Tensor) or same_memory(value, weight):
            continue
        if not torch.equal(value.to(weight.device, weight.dtype), weight):
            built[name] = _noted(weight)


def _outside(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters besides the base and what checkpoints must hold, by name."""
    params = dict(module.named_parameters(remove_duplicate=False))
    taken = {*require_record(module).frozen, *checkpoint_tensors(module)}
    ids = {id(params[name]) for name in taken if name in params}
    return {n: p for n, p in params.items() if id(p) not in ids and not p.is_meta}


def _frozen_outside(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in _outside(module).items() if not param.requires_grad}


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
) -> dict[str, BuiltWeight]:
    """Returns those in eval mode whose values the files of their models hold, by name."""
    noted: dict[str, BuiltWeight] = {}

    def is_same(name: str, value: Tensor) -> bool:
        if value.shape != weights[name].shape:
            return False
        noted[name] = _noted(weights[name])
        return exact_checksum(value.to(noted[name].dtype)) == noted[name].exact

    still = [n for n in weights if not module.get_submodule(n.rpartition(".")[0]).training]
    found = _find_in_files(module, still, is_same)
    # Files hold a weight that has several names under one of them.
    same = {id(weights[name]): noted[name] for name in found}
    return {name: same[id(one)] for name, one in weights.items() if id(one) in same}


def _find_in_files(
    module: nn.Module, names: Collection[str], is_found: Callable[[str, Tensor], bool]
) -> set[str]:
    """Returns the names of weights of which ``is_found`` takes a value in the files of a model."""
    found: set[str] = set()
    for root, model in module.named_modules():
        origin, revision = origin_of(getattr(model, "config", None))
        if origin is None or not is_pretrained(model):
            continue
        keys = {
            name: _names_in_files(model, name.removeprefix(f"{root}."))
            for name in names
            if inside(name, [root])
        }
        for path in _weight_files(origin, revision) if keys else []:
            # One that is being written, or damaged, proves nothing.
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
                there = {*file.keys()}
                for name in keys.keys() - found:
                    if any(is_found(name, file.get_tensor(k)) for k in keys[name] & there):
                        found.add(name)
            if keys.keys() <= found:
                break
    return found


def _names_in_files(model: Any, name: str) -> set[str]:
    """Returns the names from which ``from_pretrained`` reads a weight, with a head or without."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {name, prefix + name, name.removeprefix(prefix)}


def _weight_files(origin: str, revision: str | None) -> list[Path]:
    """Returns the safetensors files of a model on this machine.

    Those in subfolders only of a pipeline of diffusers: elsewhere they may be checkpoints.
    """
    folder = Path(origin)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(origin, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return []
    deeper = "*/*.safetensors" if (folder / "model_index.json").is_file() else "*.safetensors"
    return sorted({*folder.glob("*.safetensors"), *folder.glob(deeper)})


def _noted(weight: nn.Parameter) -> BuiltWeight:
    return BuiltWeight(checksum(weight), exact_checksum(weight), weight.dtype)


def _is_same(weight: Tensor, saved: BuiltWeight) -> bool:
    """Whether a module has a weight of a file, where it may have it in another dtype."""
    if weight.dtype == saved.dtype:
        return exact_checksum(weight) == saved.exact
    return checksum(weight) == saved.total


def _is_unchanged(weight: Tensor, built: BuiltWeight) -> bool:
    """Whether a weight is still what it was, where it may have been cast since."""
    if weight.dtype in (built.dtype, torch.bfloat16):
        return _is_same(weight, built)
    back = weight.to(built.dtype)
    return exact_checksum(back) == built.exact and torch.equal(back.to(weight.dtype), weight)

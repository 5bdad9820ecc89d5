"""Saving of adapters as folders in PEFT's format, ``save_pretrained`` included.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``provenance.json``
(what produced it). Nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import secrets
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from peft import PeftModel
from torch import nn

from lightning_peft.engine.adapters import adapted_layers, is_merged
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.loaded import LoadedLinear
from lightning_peft.engine.files.adapter_format import adapter_folder, differences_in_peft
from lightning_peft.engine.layers.tokens import TiedRows
from lightning_peft.engine.record import AdaptedModuleRecord, Record, adapted_parts, require_record
from lightning_peft.errors import ConfigError, LifecycleError, itemize

# Adapted submodules with their records, by the names of their folders where there are several.
AdaptedParts = Mapping[str, tuple[nn.Module, AdaptedModuleRecord]]
log = logging.getLogger(__name__)

# Models of others may have a method of that name that does it well.
_LIBRARIES = ("transformers", "diffusers", "peft", "huggingface_hub")


def save_adapter(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one adapter as a folder in PEFT's format.

    A module with one adapted part gets the files in ``path`` itself; with several, in one
    sub-folder per part. Each file is written to a temporary name and renamed when complete.

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
    write_files(folder, packed_parts(_parts(module), [name], name, provenance or {}))
    return folder


def packed_adapters(module: nn.Module, provenance: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the files of all adapters by relative path, as PEFT's ``save_pretrained`` lays out.

    The first adapter is at the top, others in sub-folders of their names. Where the first one has
    sub-folders for several parts, it is in a sub-folder of its name too.
    """
    names = require_record(module).adapter_names
    return packed_parts(_parts(module), names, names[0], provenance)


def packed_parts(
    parts: AdaptedParts, names: list[str], first: str, provenance: Mapping[str, Any]
) -> dict[str, bytes]:
    """Returns the files of the adapters ``names`` on ``parts``, with ``first`` at the top."""
    files: dict[str, bytes] = {}
    for name in names:
        own = {key: pair for key, pair in parts.items() if name in pair[1].adapters}
        at_top = name == first and (len(names) == 1 or len(own) == 1)
        for key, (part, entry) in own.items():
            folder = ("" if at_top else f"{name}/") + ("" if len(own) == 1 else f"{key}/")
            _warn_of_peft(part, entry, name)
            made = adapter_folder(part, entry, name, provenance)
            files |= {f"{folder}{file}": content for file, content in made.items()}
    return files


def _parts(module: nn.Module) -> AdaptedParts:
    return {entry.name: (part, entry) for entry, part in adapted_parts(module)}


def _warn_of_peft(part: nn.Module, entry: AdaptedModuleRecord, name: str) -> None:
    problems = differences_in_peft(part, entry, name)
    if problems:
        warnings.warn(
            f"PEFT cannot read the files of the adapter {name!r} to the same output; "
            "lightning_peft.load_adapter can:" + itemize(problems, 5),
            stacklevel=4,
        )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files by their paths below ``folder``, each whole or not at all."""
    for file, content in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / file, content)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file to a temporary name, flushes it to disk and renames it."""
    # Not the number of the process, which one on another machine may have too.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.incomplete")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def replace_save_pretrained(module: nn.Module) -> None:
    """Makes ``save_pretrained`` of the models around adapted parts write the adapters.

    Those of the libraries lose them: transformers and diffusers write adapters under names that
    ``from_pretrained`` passes over, and PEFT's wrapper writes a folder without tensors. Of a model
    strictly inside a part, with layers that were changed, ``save_pretrained`` raises.
    """
    record = require_record(module)
    keys = {id(part): entry.name for entry, part in adapted_parts(module)}
    within = {id(child) for _, part in adapted_parts(module) for child in part.modules()}
    for model in module.modules():
        if _library_method(model) is None:
            continue
        parts = {name: keys[id(x)] for name, x in model.named_modules() if id(x) in keys}
        if parts:
            vars(model)["save_pretrained"] = _SavesAdapters(model, record, parts)
        elif id(model) in within and _is_changed(model):
            vars(model)["save_pretrained"] = _refuse


def restore_save_pretrained(module: nn.Module) -> None:
    """Undoes :func:`replace_save_pretrained`."""
    for model in module.modules():
        method = vars(model).get("save_pretrained")
        if method in (_refuse, _refuse_loaded) or isinstance(method, _SavesAdapters):
            del vars(model)["save_pretrained"]


def refuse_saving_loaded_formats(module: nn.Module) -> None:
    """Makes ``save_pretrained`` raise where layers stand in for those of another library."""
    for model in module.modules():
        loaded = any(isinstance(layer, LoadedLinear) for layer in model.modules())
        if loaded and _library_method(model) is not None:
            vars(model)["save_pretrained"] = _refuse_loaded


def _refuse_loaded(*_: Any, **__: Any) -> NoReturn:
    raise LifecycleError(
        "save_pretrained of a base whose layers stand in for those of the library that quantized "
        "it: the library could not read what it writes. Copy the folder that it was loaded from; "
        "for the adapted model, merge(module) before unload(module), which makes it dense."
    )


def _library_method(model: nn.Module) -> Any | None:
    """Returns ``save_pretrained`` of the library whose class ``model`` is or derives from."""
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] in _LIBRARIES and "save_pretrained" in vars(cls):
            return vars(cls)["save_pretrained"]
    return None


def _is_changed(model: nn.Module) -> bool:
    changed = (QuantizedLayer, TiedRows)
    return bool(adapted_layers(model)) or any(isinstance(x, changed) for x in model.modules())


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise LifecycleError(
        "save_pretrained of a model with adapters: what it writes would load without them. "
        "lightning_peft.save_adapter(module, folder) writes them in PEFT's format, where module is "
        "the one that the Trainer trains, or that lightning_peft.inject was given. For the whole "
        "model, merge(module) and unload(module) first."
    )


class _SavesAdapters:
    """``save_pretrained`` of one model, with the arguments of the method that it replaces.

    Args:
        model: The model.
        record: The record of the module that adapters were added to.
        parts: The names of the adapted parts in that record, by their names inside ``model``.
    """

    def __init__(self, model: nn.Module, record: Record, parts: Mapping[str, str]) -> None:
        # A reference that keeps nothing alive: the model has this object.
        self._model, self._record, self._parts = weakref.ref(model), record, parts

    def __deepcopy__(self, memo: dict[int, Any]) -> _SavesAdapters:
        model: Any = self._model()
        # In a copy of the model it writes the values of the copy.
        model = memo.get(id(model), model)
        return type(self)(model, copy.deepcopy(self._record, memo), self._parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(), self._record, self._parts)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Writes the adapters, in any number of processes.

        Raises:
            ConfigError: If ``selected_adapters`` names one that is not there.
            LifecycleError: If adapters are merged, or with ``state_dict``.
        """
        model: Any = self._model()
        given = _arguments(model, args, kwargs)
        if not given.get("is_main_process", True):
            return
        parts = {
            name: (model.get_submodule(name), self._record.parts[key])
            for name, key in self._parts.items()
        }
        layers = [layer for part, _ in parts.values() for layer in adapted_layers(part).values()]
        if given.get("state_dict") is not None or any(map(is_merged, layers)):
            _refuse()
        folder, kind = Path(given["save_directory"]), type(model).__name__
        names = _names(parts, given.get("selected_adapters"))
        # PEFT has others in sub-folders even where there is no such adapter.
        top = "default" if isinstance(model, PeftModel) else names[0]
        write_files(folder, packed_parts(parts, names, top, {}))
        log.info("adapters of %s written to %s in PEFT's format, without the base", kind, folder)
        _warn_of_trained(model, parts, folder)
        if type(model).save_pretrained is not _library_method(model):
            log.warning("save_pretrained of %s itself is not called while it has adapters.", kind)
        if given.get("push_to_hub"):
            log.warning(
                "push_to_hub=True: nothing was uploaded. model.push_to_hub(repo_id) uploads the "
                "adapters of %s.",
                kind,
            )


def _arguments(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the arguments of the library's method by name: their order is not the same in all."""
    signature = inspect.signature(_library_method(model))  # type: ignore[arg-type]
    given = signature.bind(model, *args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def _names(parts: AdaptedParts, selected: list[str] | None) -> list[str]:
    known = list(dict.fromkeys(name for _, entry in parts.values() for name in entry.adapters))
    names = known if selected is None else list(selected)
    if not names or not {*names} <= {*known}:
        raise ConfigError(
            f"selected_adapters={selected!r}: the adapters of this model are {', '.join(known)}."
        )
    return names


def _warn_of_trained(model: nn.Module, parts: AdaptedParts, folder: Path) -> None:
    inside = {id(param) for part, _ in parts.values() for param in part.parameters()}
    outside = [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in inside
    ]
    if outside:
        log.warning(
            "%s has %d trained parameters outside of its adapted parts (%s%s), which are not in "
            "%s. Files of ModelCheckpoint have them.",
            type(model).__name__,
            len(outside),
            ", ".join(outside[:5]),
            ", ..." if len(outside) > 5 else "",
            folder,
        )

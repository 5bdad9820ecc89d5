"""Saving of adapters as folders in PEFT's format.

A folder holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``provenance.json``
(what produced it). Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_peft.engine.files.adapter_format import adapter_folder, differences_in_peft
from lightning_peft.engine.record import AdaptedModuleRecord, adapted_parts, require_record
from lightning_peft.errors import ConfigError, itemize

# Adapted submodules with their records, by the names of their folders where there are several.
AdaptedParts = Mapping[str, tuple[nn.Module, AdaptedModuleRecord]]


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

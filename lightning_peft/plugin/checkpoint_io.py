"""Atomic checkpoint files with their adapter folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.engine.files.adapter_format import PROVENANCE_FILE
from lightning_peft.errors import CheckpointError, StorageError
from lightning_peft.file_errors import write_problem
from lightning_peft.plugin.background_saving import BackgroundSaves
from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning.plugins.io import TorchCheckpointIO as _Base
else:
    _Base = object

log = logging.getLogger(__name__)

# Lightning may take an entry next to the checkpoints whose name contains "last" for a checkpoint,
# so the adapters of all checkpoints are one folder further down.
FOLDER = "adapters"


class WholeFileCheckpointIO(_Base, metaclass=LateBoundMeta):
    """Writes to a temporary name, flushes to disk, then renames: a kill leaves no partial file.

    Attributes:
        background: Where files are written while training goes on, or ``None``.
    """

    lightning_base = "plugins.io.TorchCheckpointIO"

    def __init__(self) -> None:
        super().__init__()
        self.background: BackgroundSaves | None = None
        self._warned_of: set[str] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes a local file; remote ones are left to Lightning."""
        if not is_local(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if self.background is None:
            write_whole_file(checkpoint, Path(path), self._warn_of_objects)
            return
        content = BytesIO()
        torch.save(checkpoint, content)
        write = partial(write_whole_file, content.getbuffer(), Path(path), self._warn_of_objects)
        self.background.run(write)

    def _warn_of_objects(self, file: Path) -> None:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - self._warned_of
        if names:
            self._warned_of |= names
            log.warning(
                "The checkpoint holds objects (%s) besides tensors and plain values, so that only "
                "weights_only=False can load it. They come from on_save_checkpoint, or from the "
                "state of a callback, scheduler or datamodule. Store numbers, strings or tensors "
                "there instead.",
                ", ".join(sorted(names)),
            )


def write_whole_file(
    checkpoint: dict[str, Any] | memoryview,
    target: Path,
    look: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint under another name, flushes it to disk and renames it.

    A ``memoryview`` has what ``torch.save`` made of one. ``look`` is called with the complete file
    before it has its name.
    """
    with _whole_or_absent(target) as unfinished:
        with open(unfinished, "wb") as file:
            if isinstance(checkpoint, memoryview):
                file.write(checkpoint)
            else:
                torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if look is not None:
            look(unfinished)
        os.replace(unfinished, target)


def read_checkpoint(
    read: Callable[..., dict[str, Any]], path: Any, weights_only: bool | None
) -> dict[str, Any]:
    """Reads a checkpoint without running code in it, unless it is trusted.

    Args:
        read: A CheckpointIO's ``load_checkpoint``, or a strategy's.
        path: The file.
        weights_only: Only ``False`` trusts the file. Lightning's ``None`` trusts remote files.
    """
    trusted = weights_only is False
    try:
        loaded = read(path, weights_only=not trusted)
    except (FileNotFoundError, PermissionError):
        raise
    except UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors and plain values ({_reason(error)}). Reading "
            "it could run code, so nothing of it was executed. If you trust where it comes from, "
            "pass weights_only=False."
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{str(path)!r} is not a complete checkpoint "
            f"({type(error).__name__}: {_reason(error)}). It was cut short, or is "
            "another kind of file. Use an earlier checkpoint of the run."
        ) from error
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of a Trainer: it has no `state_dict`. Adapter "
            "folders are loaded by lightning_peft.load_adapter."
        )
    return loaded


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch puts pages of advice around the one line that says what was found.
    telling = [line for line in lines if "unsupported" in line.lower()]
    return (telling or lines or [type(error).__name__])[0][:160]


def is_local(path: Any) -> bool:
    """Returns whether ``path`` is on this machine's file system, not behind an fsspec protocol."""
    return "://" not in str(path)


def adapter_folder(checkpoint: Any) -> Path:
    """Returns where the adapter of a checkpoint file is."""
    path = Path(checkpoint)
    return path.parent / FOLDER / path.name.removesuffix(".ckpt")


def write_adapter_folder(checkpoint: Any, files: dict[str, bytes]) -> None:
    """Writes the adapter folder of a checkpoint; an older one is replaced when all is written."""
    folder = adapter_folder(checkpoint)
    with _whole_or_absent(folder) as unfinished:
        _write_files(unfinished, files)
        # A folder cannot be renamed onto another one.
        if folder.exists():
            _remove(_replaced(folder))
            os.replace(folder, _replaced(folder))
        os.replace(unfinished, folder)
        _remove(_replaced(folder))


def put_back_adapter_folder(checkpoint: Any) -> None:
    """Gives a checkpoint the adapter folder that a process was replacing when it was killed.

    It is that of the file, which is written after the folder. Called where a run is resumed, since
    a process at work on the folder would not find its own.
    """
    folder = adapter_folder(checkpoint)
    if is_local(checkpoint) and _replaced(folder).is_dir() and not folder.exists():
        os.replace(_replaced(folder), folder)


def match_adapter_folder(
    checkpoint: Any, place: dict[str, Any], make: Callable[[], dict[str, bytes]]
) -> None:
    """Writes an adapter folder again whose process was killed before it wrote its checkpoint.

    ``place`` is epoch and step of the checkpoint, whose folder has the files of ``make``.
    """
    folder = adapter_folder(checkpoint)
    for file in sorted(folder.rglob(PROVENANCE_FILE)) if is_local(checkpoint) else ():
        facts = json.loads(file.read_text(encoding="utf-8"))
        found = {name: facts.get(name) for name in place}
        if found != place and None not in found.values():
            write_adapter_folder(checkpoint, make())
            log.warning(
                "%s was of step %s, and its checkpoint is of step %s: a process was killed "
                "between the two. The folder has the adapters of the checkpoint again.",
                folder,
                found["global_step"],
                place["global_step"],
            )
            return


def put_back_adapter_folders(root: Path) -> None:
    """Gives all checkpoints below ``root`` the adapter folders that were being replaced."""
    for aside in list(root.rglob(".replaced-*")):
        for checkpoint in aside.parent.parent.iterdir():
            if checkpoint.is_file() and _replaced(adapter_folder(checkpoint)) == aside:
                put_back_adapter_folder(checkpoint)


def _replaced(folder: Path) -> Path:
    """Where an adapter folder is while another one takes its place."""
    return folder.with_name(f".replaced-{_code(folder)}")


def _write_files(unfinished: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_bytes(content)
    # All are written before the first is flushed, which then flushes most of the others too.
    for name in files:
        with open(unfinished / name, "rb") as file:
            os.fsync(file.fileno())


def remove_adapter_folder(checkpoint: Any) -> None:
    """Removes the adapter folder of a checkpoint, and the folder of folders with the last one."""
    folder = adapter_folder(checkpoint)
    for one in (folder, _replaced(folder)):
        shutil.rmtree(one, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[Path]:
    """Yields a place to write to before it is renamed; what fails leaves nothing there."""
    unfinished = _unfinished(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        yield unfinished
    except (OSError, RuntimeError) as error:
        problem = write_problem(unfinished, error)
        with suppress(OSError):
            _remove(unfinished)
        if problem is None:
            raise
        raise StorageError(
            f"The checkpoint {str(target)!r} was not written: {problem}. Those written before are "
            "whole; continue from the newest."
        ) from error


def _unfinished(target: Path, process: str | None = None) -> Path:
    return target.with_name(f".incomplete-{process or os.getpid()}-{_code(target)}")


def _code(target: Path) -> str:
    # Instead of its name, by which Lightning and others recognise checkpoints.
    return f"{zlib.crc32(target.name.encode()):08x}"


def _remove_abandoned(target: Path) -> None:
    for left in target.parent.glob(_unfinished(target, "*").name):
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

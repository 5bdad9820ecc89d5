"""Checkpoint files that are whole or absent, with the adapter in PEFT's format beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.errors import CheckpointError
from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning.plugins.io import TorchCheckpointIO as _Base
else:
    _Base = object

# Key of the checkpoint dictionary under which everything of this package is.
KEY = "lightning_peft"
FILES = "adapter_files"
FOLDER = "adapters"


class AdapterCheckpointIO(_Base, metaclass=PerNamespace):
    """Writes beside the place, flushes to disk, then renames: a kill leaves no half checkpoint.

    The adapter goes to ``adapters/<name of the checkpoint>/`` in the same folder. It is a folder
    of its own because Lightning takes every entry whose name contains ``last`` for a checkpoint.
    """

    lightning_base = "plugins.io.TorchCheckpointIO"

    def __init__(self, inner: Any = None) -> None:
        super().__init__()
        self.inner = inner

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the checkpoint and, from what it carries, the adapter folder."""
        described = checkpoint.get(KEY, {})
        files = described.get(FILES, {})
        if files:
            kept = {key: value for key, value in described.items() if key != FILES}
            checkpoint = {**checkpoint, KEY: kept}
        if self.inner is not None or "://" in str(path):
            self._plain_save(checkpoint, path, storage_options)
            if "://" not in str(path):
                write_folder(adapter_folder(path), files)
            return
        if storage_options is not None:
            raise TypeError("storage_options need a CheckpointIO of your own (plugins=...).")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in target.parent.glob(f".incomplete-*-{target.stem}"):
            abandoned.unlink()
        unfinished = target.with_name(f".incomplete-{os.getpid()}-{target.stem}")
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        write_folder(adapter_folder(target), files)
        # Last: from here on the checkpoint exists, and everything beside it does.
        os.replace(unfinished, target)

    def _plain_save(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        if self.inner is not None:
            self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint without executing anything from it, unless told to trust it.

        Raises:
            CheckpointError: If the file is cut short, is no checkpoint, or could run code.
        """
        if map_location is None:
            map_location = torch.device("cpu")
        source = self.inner if self.inner is not None else super()
        trusted = weights_only is False
        try:
            loaded: dict[str, Any] = source.load_checkpoint(
                path, map_location=map_location, weights_only=not trusted
            )
        except UnpicklingError as error:
            raise CheckpointError(
                f"{str(path)!r} holds more than tensors and plain values, and reading it could run "
                f"code, so nothing of it was executed ({_first_line(error)}). If you trust where it "
                "comes from, pass weights_only=False to trainer.fit or load_from_checkpoint."
            ) from error
        except (RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"{str(path)!r} is no complete checkpoint ({_first_line(error)}). It was cut short "
                "or is another kind of file; use an earlier checkpoint of the run."
            ) from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the checkpoint and the adapter folder beside it."""
        if self.inner is not None:
            self.inner.remove_checkpoint(path)
        else:
            super().remove_checkpoint(path)
        if "://" not in str(path):
            shutil.rmtree(adapter_folder(path), ignore_errors=True)
            parent = adapter_folder(path).parent
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def teardown(self) -> None:
        """Passes the call on."""
        if self.inner is not None:
            self.inner.teardown()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def adapter_folder(checkpoint: Any) -> Path:
    """Returns where the adapter of a checkpoint file is."""
    path = Path(checkpoint)
    return path.parent / FOLDER / path.stem


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Writes ``files`` as the new content of ``folder``, replacing an older one at the end."""
    if not files:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".incomplete-{os.getpid()}-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, content in files.items():
        file = unfinished / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    if folder.is_dir():
        replaced = folder.with_name(f".replaced-{os.getpid()}-{folder.name}")
        os.replace(folder, replaced)
        os.replace(unfinished, folder)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(unfinished, folder)

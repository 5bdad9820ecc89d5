"""Files of a run folder."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import time
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from lightning_peft.errors import ConfigError, itemize
from lightning_peft.runs.status import Status, read_status, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

DEFAULT_ROOT = "runs"
# Arguments of models and data that name what is read.
_READ = {"config", "data", "model", "processor", "test_data", "tokenizer", "validation_data"}


class RunFolder:
    """One run on disk; docs/runs.md describes every file for other programs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    recipe = property(lambda self: self.path / "recipe.yaml")
    status_file = property(lambda self: self.path / "status.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    load = property(lambda self: self.path / "load.jsonl")
    events = property(lambda self: self.path / "events.jsonl")
    samples = property(lambda self: self.path / "samples.jsonl")
    prompts = property(lambda self: self.path / "prompts.json")
    predictions = property(lambda self: self.path / "predictions.jsonl")
    control = property(lambda self: self.path / "control.json")
    log = property(lambda self: self.path / "train.log")
    error = property(lambda self: self.path / "error.json")
    provenance = property(lambda self: self.path / "provenance.json")
    result = property(lambda self: self.path / "result.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    evaluations = property(lambda self: self.path / "evaluations")
    # Of a sweep: what is tried, and the table of its trials.
    sweep = property(lambda self: self.path / "sweep.json")
    trials = property(lambda self: self.path / "trials.json")

    @classmethod
    def create(cls, root: Path, name: str) -> RunFolder:
        """Makes a new folder below ``root``; its name begins with the time, so that runs sort."""
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "run"
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = root / f"{stamp}-{words}-{secrets.token_hex(2)}"
        return cls(path)._make(exist_ok=False)

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """Returns the folder ``path``, which is made if it is not there."""
        return cls(path)._make(exist_ok=True)

    def _make(self, exist_ok: bool) -> RunFolder:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            raise self._refusal(error) from error
        return self

    def _refusal(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The run cannot be kept in {str(self.path)!r}: {error.strerror or error}. Name a "
            "folder that can be written to: --run_dir of a run, --runs of a sweep."
        )

    @property
    def status(self) -> Status | None:
        """Where the run is; ``None`` before it has said so."""
        return read_status(self.status_file)

    def append(self, path: Path, row: dict[str, Any]) -> None:
        """Adds a line to one of the JSONL files; a reader may see its beginning only."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write(self, path: Path, content: Any) -> None:
        """Writes one of the JSON files as a whole."""
        write_json(path, content)

    def write_error(self, error: BaseException) -> None:
        """Writes down what ended the run."""
        trace = traceback.format_exception(error)
        content = {"error": type(error).__name__, "message": str(error), "traceback": trace}
        self.write(self.error, content)

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yields the rows of one of the JSONL files, without a last line that is not whole."""
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def decided(self) -> dict[str, Any]:
        """Returns the decisions of the run for arguments that are ``"auto"``, by their names."""
        return dict(self._facts().get("decided") or {})

    def _facts(self) -> dict[str, Any]:
        try:
            content = json.loads(self.provenance.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def check_directory(self, overrides: Sequence[str] = ()) -> None:
        """Refuses to run the recipe where relative paths in it do not lead to its files.

        ``overrides`` are arguments of the command line, which may name others; nothing is refused
        where another config is among them.

        Raises:
            ConfigError: If the run began in another folder, which has files that are not found
                from the current one.
        """
        begun = self._facts().get("directory")
        if not isinstance(begun, str) or not os.path.isdir(begun):
            return
        try:
            recipe = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            # Reading it for the run says what is wrong.
            return
        words = {word.partition("=")[0].replace(".init_args", "") for word in overrides}
        if "--config" in words:
            return
        lost = [
            f"{key}: {value!r}"
            for key, value in _texts(recipe)
            if key.rpartition(".")[2] in _READ
            and not any(f"--{key}.".replace(".init_args", "").startswith(f"{w}.") for w in words)
            and not os.path.exists(value)
            and os.path.exists(os.path.join(begun, value))
        ]
        if lost:
            raise ConfigError(
                f"The run began in {begun!r}, and paths in its recipe begin there; from "
                f"{os.getcwd()!r} they lead nowhere:"
                + itemize(lost)
                + f"\nGo there first: cd {shlex.quote(begun)}"
            )

    def newest_checkpoint(self) -> Path | None:
        """Returns the checkpoint to go on from: the one that was written last.

        Of a run that was stopped, the one that was saved for it: Lightning may write others after
        that, in which the epoch counts as done.
        """
        status = self.status
        if status is not None and status.state == "stopped" and status.checkpoint:
            saved = self.path / status.checkpoint
            if saved.is_file():
                return saved
        return min(self.checkpoints.glob("*.ckpt"), key=_age, default=None)

    def resumable_checkpoint(self, warn: bool = True) -> Path | None:
        """Returns the newest checkpoint that is whole; ``None`` where there are none at all.

        With ``warn``, those that are not whole are logged.
        """
        newest = self.newest_checkpoint()
        others = sorted(self.checkpoints.glob("*.ckpt"), key=_age)
        candidates = list(dict.fromkeys([newest, *others])) if newest is not None else []
        broken = list(itertools.takewhile(lambda path: not _is_whole(path), candidates))
        names = ", ".join(path.name for path in broken)
        if candidates and len(broken) == len(candidates):
            raise ConfigError(
                f"{str(self.checkpoints)!r} has no whole checkpoint: {names} cannot be read to the "
                "end. Start a new run."
            )
        if broken and warn:
            taken = candidates[len(broken)]
            log.warning(
                "%s in %s cannot be read to the end, as after a disk that was full or a power cut. "
                "The one before is taken, %s, and what came after it is trained again.",
                names,
                self.checkpoints,
                taken.name,
            )
        return candidates[len(broken)] if candidates else None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other runs out of the folder; the system ends that with the process, however."""
        try:
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise self._refusal(error) from error
        with file:
            try:
                # Of the process, not of its loaders' processes, which may outlive it for a while.
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                status = self.status
                of = f" (process {status.pid})" if status is not None and status.pid else ""
                raise ConfigError(
                    f"Another run{of} is at work in {str(self.path)!r}. Wait until it ends, stop "
                    "it, or name another folder with run_dir."
                ) from None
            except OSError:
                # A network disk without locks.
                log.warning("%s cannot be locked: start no second run in it.", self.path)
            else:
                # Without locks another run may be at work on them.
                if fcntl is not None:
                    self._remove_unfinished()
            yield

    def _remove_unfinished(self) -> None:
        """Removes what a run that was killed had begun to save, and no save takes the place of."""
        # Imported here, since others only look at folders.
        saving = import_module("lightning_peft.plugin.checkpoint_io")
        saving.put_back_adapter_folders(self.checkpoints)
        names = (".incomplete-*", ".replaced-*")
        for left in [path for name in names for path in self.checkpoints.rglob(name)]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields the texts in a recipe with their dotted keys; in a list, with the key of the list."""
    if isinstance(value, str) and value:
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, key)


def _age(path: Path) -> int:
    return -path.stat().st_mtime_ns


def _is_whole(checkpoint: Path) -> bool:
    """Whether the end of a checkpoint is there, which lists all that is in it."""
    try:
        with zipfile.ZipFile(checkpoint) as file:
            return bool(file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def runs_in(root: Path) -> list[RunFolder]:
    """Returns the runs below ``root``, the newest first; sweeps are none."""
    folders = [RunFolder(path) for path in sorted(root.iterdir(), reverse=True)]
    return [one for one in folders if one.status_file.is_file() and not one.sweep.is_file()]

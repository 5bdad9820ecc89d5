"""Harness tasks from the user's folders, this package and the harness."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.tasks import TaskManager

from lightning_peft.errors import ConfigError, first_line, itemize, similar_names

# Two tasks with their rows, for a first look and for machines without network.
SMALL_TASKS = Path(__file__).with_name("small_tasks")


@dataclass(frozen=True)
class Seeds:
    """Seeds of the random number generators; the harness' own ones by default."""

    python: int = 0
    numpy: int = 1234
    torch: int = 1234
    fewshot: int = 1234

    def set(self) -> None:
        """Seeds the global generators, as the harness does before it loads tasks."""
        random.seed(self.python)
        numpy.random.seed(self.numpy)
        torch.manual_seed(self.torch)


HARNESS_SEEDS = Seeds()


@dataclass
class TaskSet:
    """Tasks with their rows, ready to be evaluated."""

    # What the harness' `TaskManager.load` returns.
    loaded: dict[str, Any]
    requested: list[str]
    # By task, the local files with its rows and their sha256.
    data_files: dict[str, dict[str, str]] = field(default_factory=dict)
    # What a user should know.
    notes: list[str] = field(default_factory=list)


def load_tasks(
    names: Sequence[str],
    folders: Sequence[str] = (),
    *,
    num_fewshot: int | None = None,
    seeds: Seeds = HARNESS_SEEDS,
) -> TaskSet:
    """Returns tasks, groups or tags of the harness, of ``folders`` or of this package.

    A relative file of rows is looked for next to the YAML file, then in the working directory. A
    task that says that it has 0 solved examples keeps them, as in the harness.
    """
    _check_folders(folders)
    resolved = [Path(folder).resolve() for folder in folders]
    manager, unknown = _find(names, resolved)
    if unknown:
        raise ConfigError(_unknown(unknown, manager, folders))
    seeds.set()
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    found = TaskSet(loaded, list(names))
    problems = []
    with _files_next_to_tasks(manager, [SMALL_TASKS, *resolved]):
        for name in names:
            try:
                parts = manager.load([name])
            # A task is code and data of others, which may raise anything.
            except Exception as error:
                problems.append(_not_loaded(name, manager.task_index[name], error))
                continue
            for part, content in loaded.items():
                content |= parts.get(part) or {}
    if problems:
        raise ConfigError("Tasks cannot be evaluated:" + itemize(problems))
    for task_name, task in loaded["tasks"].items():
        found.data_files[task_name] = _data_files(task)
        found.notes += _set_fewshot(task_name, task, num_fewshot, seeds.fewshot)
    return found


def _check_folders(folders: Sequence[str]) -> None:
    problems = [
        f"{folder!r} is not a folder here" if not Path(folder).is_dir() else f"{folder!r} has none"
        for folder in folders
        if not any(Path(folder).glob("**/*.yaml"))
    ]
    if problems:
        raise ConfigError(
            "--include-path takes folders with tasks as YAML files:" + itemize(problems)
        )


def _find(names: Sequence[str], folders: list[Path]) -> tuple[Any, list[str]]:
    """Returns a manager that knows the tasks, and the names that none knows."""
    include: list[Path | str] = [SMALL_TASKS, *folders]
    manager = TaskManager(include_path=include, include_defaults=False)
    # The harness' own 14,000 files take many seconds to read; groups and tags may name them.
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include)
    return manager, [name for name in names if name not in manager.task_index]


def _unknown(names: list[str], manager: Any, folders: Sequence[str]) -> str:
    lines = [f"{name!r}{similar_names(name, manager.all_tasks)}" for name in names]
    text = "There are no tasks of these names:" + itemize(lines)
    read = {entry.yaml_path for entry in manager.task_index.values()}
    files = [file for folder in folders for file in sorted(Path(folder).resolve().rglob("*.yaml"))]
    unread = [str(file) for file in files if file not in read]
    if unread:
        text += "\nThese files of --include-path define no task that can be read:" + itemize(unread)
    return text


@contextmanager
def _files_next_to_tasks(manager: Any, folders: Sequence[Path]) -> Iterator[None]:
    """Within the body, relative files of rows are those next to the YAML file, where it has any.

    The harness takes them from the working directory alone, so that a folder of tasks would depend
    on where the command is called.
    """
    with TemporaryDirectory() as made:
        for number, entry in enumerate(manager.task_index.values()):
            path, own = entry.yaml_path, (entry.cfg or {}).get("dataset_kwargs")
            if path is None or not own or not any(path.is_relative_to(one) for one in folders):
                continue
            files = _absolute(own.get("data_files"), path.parent)
            if files != own.get("data_files"):
                # JSON is YAML.
                text = {"include": str(path), "dataset_kwargs": own | {"data_files": files}}
                entry.yaml_path = Path(made, f"{number}.yaml")
                entry.yaml_path.write_text(json.dumps(text), encoding="utf-8")
        yield


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(one, folder) for split, one in files.items()}
    if isinstance(files, list):
        return [_absolute(one, folder) for one in files]
    here = folder / str(files)
    return str(here) if files and here.is_file() else files


def _named_files(dataset_kwargs: Any) -> list[str]:
    files = (dataset_kwargs or {}).get("data_files") or []
    named = files.values() if isinstance(files, Mapping) else [files]
    lists = [[each] if isinstance(each, str) else each for each in named]
    return [str(file) for each in lists for file in each]


def _data_files(task: Any) -> dict[str, str]:
    files = [Path(file) for file in _named_files(task.config.dataset_kwargs)]
    return {
        str(file.resolve()): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def _not_loaded(name: str, entry: Any, error: Exception) -> str:
    reason = f"{first_line(error)} ({type(error).__name__})"
    if not isinstance(error, ConnectionError | DatasetNotFoundError | HfHubHTTPError):
        return f"{name!r}: {reason}"
    source = (entry.cfg or {}).get("dataset_path")
    where = f"the data set {source!r}" if source else "data sets"
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    remedy = "unset HF_HUB_OFFLINE" if offline else "check the name and the network"
    return (
        f"{name!r} takes {where} from the hub, which did not give it ({reason}): {remedy}, or "
        "evaluate tasks with local files (--include-path)"
    )


def _set_fewshot(name: str, task: Any, wanted: int | None, seed: int) -> list[str]:
    """Does to a task what the harness' ``simple_evaluate`` does."""
    own = task.get_config("num_fewshot")
    notes = []
    if wanted is not None and own == 0 != wanted:
        notes.append(f"{name} is always asked without solved examples: its file says 0")
    elif wanted is not None or own is None:
        task.set_config(key="num_fewshot", value=wanted or 0)
    task.set_fewshot_seed(seed=seed)
    return notes

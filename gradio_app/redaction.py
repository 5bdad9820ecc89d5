"""Redaction of server paths in everything visitors can see."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from gradio_app.settings import Settings
from lightning_peft.demo.real_base import SMOLLM2_PLACE, smollm2
from lightning_peft.recipe_files import recipes_folder
from lightning_peft.runs.status import Status

# Stands for a file that the owner of a recipe has uploaded, wherever this server keeps them.
UPLOAD = "upload:"
# What the page puts before the name of an uploaded file.
_UPLOADED = re.compile(rf"^(?:{UPLOAD})?\d{{8}}-[0-9a-f]{{8}}-")
# Absolute paths; not those in an address, and none of a single name, such as an end of a tag.
_PATH = re.compile(r"(?:(?<![\w/.~])|(?<=file://))(?:/[\w.+@~=-]+){2,}")
_CACHES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "GRADIO_TEMP_DIR", "TORCH_HOME")


def short_name(place: object) -> str:
    """Returns the last name of where a model or data is; of an upload, that of its file."""
    name = str(place or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return _UPLOADED.sub("", name).removesuffix(".gguf")


@cache
def bundled_folders() -> dict[str, Path]:
    """Returns the folders of what comes with the package, by the mark that stands for them.

    So has the demo's real model, where it is installed.
    """
    spec = find_spec("lightning_peft")
    assert spec is not None
    assert spec.origin is not None
    own = {"package:": Path(spec.origin).resolve().parent, "recipe:": recipes_folder().resolve()}
    real = smollm2()
    mark = SMOLLM2_PLACE.rpartition("/")[0] + "/"
    return own if real is None else {**own, mark: real.resolve().parent}


@dataclass(frozen=True)
class Redactor:
    """How texts, recipes and records of a run, if any, are given out.

    Whoever has the machine to themselves sees its paths, which are of use there. On a Space
    everyone is a stranger.
    """

    settings: Settings = Settings()
    run: Path | None = None

    def portable(self, text: str) -> str:
        """Returns a recipe with marks for what lies in the package or was uploaded."""
        for pattern, mark in _marks(self.settings.uploads):
            text = pattern.sub(mark, text)
        return self._strip_folders(text) if self.settings.space else text

    def record(self, text: str) -> str:
        """Returns a recipe or record as it is; for strangers, as :meth:`portable` does."""
        return self.portable(text) if self.settings.space else text

    def text(self, text: str) -> str:
        """Returns a program's output; for strangers, with the last name of every path."""
        if not self.settings.space:
            return text
        return _PATH.sub(lambda found: found[0].rpartition("/")[2], self.portable(text))

    def value(self, value: Any, how: Callable[[str], str] | None = None) -> Any:
        """Returns values, however nested, with every text among them as :meth:`text` has it."""
        how = how or self.text
        if isinstance(value, str):
            return how(value)
        if isinstance(value, dict):
            return {key: self.value(one, how) for key, one in value.items()}
        return [self.value(one, how) for one in value] if isinstance(value, list) else value

    def status(self, status: Status) -> Status:
        """Returns the state of a run."""
        return Status(**self.value(asdict(status))) if self.settings.space else status

    def _strip_folders(self, text: str) -> str:
        if self.run is not None:
            for folder in {self.run, self.run.resolve()}:
                text = _folder_pattern([str(folder)]).sub(_remainder, text)
        return _folders(self.settings).sub(_remainder, text)


@cache
def _marks(uploads: Path) -> list[tuple[re.Pattern[str], str]]:
    """Returns the folders of the marks, the innermost first."""
    inner = sorted(bundled_folders().items(), key=lambda one: -len(str(one[1])))
    # Paths of the package's code stay as Python prints them.
    found = [
        (re.compile(rf"{re.escape(str(folder))}/(?![\w./+-]*\.pyc?\b)"), mark)
        for mark, folder in inner
    ]
    for folder in {uploads, uploads.resolve()}:
        found.append((re.compile(rf"{re.escape(str(folder))}/\w[\w-]*/"), UPLOAD))
    return found


@cache
def _folders(settings: Settings) -> re.Pattern[str]:
    """Returns the pattern of this machine's folders: the server's, its owner's, and Python's."""
    known = [settings.runs, settings.uploads, settings.runs.parent, Path.home(), Path.cwd()]
    known += [folder.parent for folder in bundled_folders().values()]
    known += [Path(place) for place in (*sys.path, sys.prefix, sys.base_prefix, gettempdir())]
    known += [Path(os.environ[name]) for name in _CACHES if os.environ.get(name)]
    absolute = [folder for folder in known if folder.is_absolute()]
    return _folder_pattern({str(one) for folder in absolute for one in (folder, folder.resolve())})


def _folder_pattern(folders: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted(set(folders) - {"/"}, key=lambda folder: (-len(folder), folder))
    # One name, such as /tmp, also ends paths of others.
    whole = [
        re.escape(folder) if folder.count("/") > 1 else rf"(?<![\w.~-]){re.escape(folder)}"
        for folder in ordered
    ]
    return re.compile(rf"(?:{'|'.join(whole)})(?:/|(?!\w))")


def _remainder(found: re.Match[str]) -> str:
    return "" if found[0].endswith("/") else "."

"""Allowed locations of data and models in a visitor's recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, inside, real_path, shortened
from gradio_app.redaction import UPLOAD, bundled_folders
from gradio_app.settings import Settings
from gradio_app.uploads import Uploads

# Of the files below a root, as many are listed.
MAX_LISTED = 500
_MARKS = ("package:", "recipe:")
_INSTALLED = "installed:"
_KINDS = "jsonl|ndjson|json|csv|tsv|tab|parquet|arrow|xlsx|xlsm|txt|md"
_FILE = re.compile(rf".*\.({_KINDS})(\.(gz|bz2|xz|zst|zip))?")
_GGUF_FILE = re.compile(r"[\w-][\w./-]{0,199}\.gguf", re.IGNORECASE)
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,99}")


@dataclass(frozen=True)
class AllowedPaths:
    """What one owner may read and write on a server."""

    settings: Settings
    owner: str

    @property
    def uploads(self) -> Path:
        """Folder of what the owner has uploaded."""
        return self.settings.uploads / self.owner

    def data(self, value: object) -> str:
        """Returns the path of some rows as the run gets it, or their name on the hub."""
        text = _checked_text(value)
        if text.startswith(UPLOAD):
            return Uploads(self.settings, self.owner).get(text.removeprefix(UPLOAD)).path.as_posix()
        root = self.settings.data_root
        found = (
            _bundled_path(text)
            or _path_below(text, self.uploads)
            or _path_in_root(text, root, Path.exists)
        )
        if found is not None:
            return found
        path_like = Path(text).is_absolute() or text.startswith((".", "~"))
        if path_like or "\\" in text or _FILE.fullmatch(text.lower()):
            if root is None:
                raise UserError("checks.no_paths", path=shortened(text))
            near = nearest_file(root, text)
            hint = UserError("checks.near", near=shortened(near)) if near else None
            more = [hint or UserError("checks.not_near")]
            raise UserError("checks.no_data", path=shortened(text), more=more)
        return _hub_name(text)

    def model(self, value: object) -> str:
        """Returns the path of a model, tokenizer or processor for the run, or a hub name.

        A model may be a GGUF file: of a folder, or of the hub as ``namespace/name:file.gguf``.
        """
        text = _checked_text(value)
        root = self.settings.models_root
        found = _bundled_path(text) or _path_in_root(text, root, _is_model)
        if found is not None:
            return found
        hub_name, colon, file = text.partition(":")
        if colon and _GGUF_FILE.fullmatch(file) and ".." not in file:
            return f"{_hub_name(hub_name)}:{file}"
        if Path(text).is_absolute() or text.startswith((".", "~")) or "\\" in text:
            raise UserError("checks.no_model", path=shortened(text))
        return _hub_name(text)

    def written(self, value: object) -> str:
        """Returns the name of the file for the rows that a run skips.

        Its folder is that of the run, which is only known when it starts; a path that an earlier
        run had there stands for the name.
        """
        text = _checked_text(value)
        if _path_below(text, self.settings.runs) is not None:
            text = Path(text).name
        if not _FILE_NAME.fullmatch(text) or ".." in text:
            raise UserError("checks.written", path=shortened(text))
        return text


def _is_model(path: Path) -> bool:
    return path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file())


@dataclass(frozen=True)
class DataFiles:
    """Data files below a root by name, with their bytes, and how many more there are."""

    sizes: dict[str, int] = field(default_factory=dict)
    left_out: int = 0


def data_files(root: Path) -> DataFiles:
    """Returns the data files below a root, two levels deep.

    A folder of several, such as ``train.jsonl`` and ``test.jsonl``, is one more entry: its name
    ends in ``/``. Hidden files and links that leave the root are not among them. Where there are
    too many, files in folders are left out first.
    """
    top = root.resolve()
    first: dict[str, int] = {}
    nested: dict[str, int] = {}
    for entry in _entries_in(root, top):
        if _is_folder(entry):
            inside_it = _sizes_in(_entries_in(Path(entry.path), top))
            nested |= {f"{entry.name}/{name}": size for name, size in inside_it.items()}
            if len(inside_it) > 1:
                first[f"{entry.name}/"] = sum(inside_it.values())
        else:
            first |= _sizes_in([entry])
    found = [*sorted(first.items()), *sorted(nested.items())]
    return DataFiles(dict(sorted(found[:MAX_LISTED])), len(found[MAX_LISTED:]))


def nearest_file(root: Path | None, text: str) -> str:
    """Returns the data file below a root whose name is most like a text; empty if none is."""
    near = get_close_matches(text, data_files(root).sizes, n=1) if root is not None else []
    return near[0] if near else ""


def _entries_in(folder: Path, top: Path) -> list[os.DirEntry[str]]:
    """Returns the visible entries of a folder, without links that leave ``top``."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry
                for entry in entries
                if not entry.name.startswith(".")
                # Only links can leave it, and following each path takes long.
                and (not entry.is_symlink() or _is_below(real_path(Path(entry.path)), top))
            ]
    except OSError:
        # Removed meanwhile, or not this user's.
        return []


def _is_below(path: Path | None, top: Path) -> bool:
    return path is not None and path.is_relative_to(top)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _sizes_in(entries: Iterable[os.DirEntry[str]]) -> dict[str, int]:
    """Returns the bytes of each data file among some entries."""
    sizes = {}
    for entry in entries:
        try:
            if _FILE.fullmatch(entry.name.lower()) and entry.is_file():
                sizes[entry.name] = entry.stat().st_size
        except OSError:
            # Removed meanwhile.
            continue
    return sizes


def _checked_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > 500:
        raise UserError("checks.place", value=shortened(value))
    return value.strip()


def _bundled_path(text: str) -> str | None:
    """Returns ``text`` with its mark if it stands for a file or folder of the package."""
    for mark, folder in bundled_folders().items():
        if text.startswith(mark) or _path_below(text, folder) is not None:
            path = inside(folder, text.removeprefix(mark))
            if not path.exists():
                raise UserError("checks.not_bundled", path=shortened(text.removeprefix(mark)))
            return f"{mark}{path.relative_to(folder).as_posix()}"
    if text.startswith(_INSTALLED):
        raise UserError("checks.not_installed", path=shortened(text.removeprefix(_INSTALLED)))
    if text.startswith(_MARKS) or re.match(r"\w+:", text):
        raise UserError("errors.hub_name", name=shortened(text))
    return None


def _path_below(text: str, root: Path) -> str | None:
    """Returns an absolute path below ``root`` that exists; ``None`` for everything else."""
    found = real_path(Path(text)) if Path(text).is_absolute() else None
    if found is None or not found.is_relative_to(root.resolve()):
        return None
    return found.as_posix() if found.exists() or found.parent.is_dir() else None


def _path_in_root(text: str, root: Path | None, is_there: Callable[[Path], bool]) -> str | None:
    """Returns an absolute path below ``root``, or a relative one in it for which that holds."""
    if root is None:
        return None
    if not Path(text).is_absolute() and is_there(root / text):
        return inside(root, text).as_posix()
    return _path_below(text, root)


def _hub_name(text: str) -> str:
    name = checked_hub_name(text)
    # Libraries take a folder of that name in the working directory before they ask the hub.
    if Path(name).exists():
        raise UserError("checks.shadowed", name=name)
    return name

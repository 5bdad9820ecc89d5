"""Reading of rows from files, folders and the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from lightning_peft.data.columnar import has_classes, with_class_names, without_nulls
from lightning_peft.data.data_files import (
    SUFFIXES,
    is_data_file,
    is_text_file,
    read_file,
    suffix_of,
)
from lightning_peft.data.file_format import FileFormat, ReadOptions, Row, TextUnit
from lightning_peft.data.open_files import explain_errors, explained_rows
from lightning_peft.data.shapes import FIELDS
from lightning_peft.errors import ConfigError, itemize

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **{"training": "train", "testing": "test"},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
# Pages and records next to data, of the hub and of the datasets library.
_PAGES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A file, folder or dataset on the hub with rows; arguments as of ``RowDataModule``.

    ``split`` is the split of every row; ``None`` leaves that to the data. ``prefix`` is put before
    the names of files, see :func:`named_apart`.
    """

    data: str
    split: str | None = None
    hub_config: str | None = None
    hub_splits: dict[str, str] | None = None
    hub_revision: str | None = None
    streaming: bool = False
    limit: int | None = None
    text_unit: TextUnit = "line"
    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | int | None = None
    columns: dict[str, str] | None = None
    prefix: str = ""

    def files(self) -> list[Path]:
        """Returns the files, sorted; an empty list for a dataset on the hub."""
        path = Path(self.data)
        if path.is_dir():
            return _files_in(path)
        # A link to nothing is refused on reading.
        if path.is_file() or path.is_symlink():
            suffix_of(path)
            return [path]
        if path.is_absolute() or self.data.startswith(".") or is_data_file(path):
            raise ConfigError(_no_such_file(path))
        return []

    def content(self) -> list[tuple[str, Path]]:
        """Returns every file that decides what the rows are, with its name in the folder."""
        return self._named(self.files())

    def _named(self, paths: list[Path]) -> list[tuple[str, Path]]:
        return [(self.name_of(path), path) for path in paths]

    def name_of(self, path: Path) -> str:
        """Returns the name of a file of this source: in its folder, or alone."""
        root = Path(self.data)
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        return self.prefix + name

    def column_of(self, ours: str, row: Mapping[str, Any]) -> str | None:
        """Returns the column of a row that holds a field: the one mapped to it, or recognised."""
        mapped = self.columns or {}
        names = (mapped[ours],) if ours in mapped else FIELDS[ours]
        taken = {theirs for other, theirs in mapped.items() if other != ours}
        return next((name for name in names if name in row and name not in taken), None)

    def digest(self) -> str:
        """Returns a hash of the content: of its files, or of the rows of a dataset on the hub."""
        files = self.content()
        if files:
            return digest_of_files(files)
        return digest_of_rows(row._asdict() for row in self.rows())

    def left_out(self) -> list[str]:
        """Returns the names of the files in the folder that are not read."""
        folder = Path(self.data)
        if not folder.is_dir():
            return []
        read = set(self.files())
        return [name for name, path in self._named(visible_files(folder)) if path not in read]

    def named_files(self) -> list[Path]:
        """Returns the files that are there and that rows name, such as recordings."""
        return []

    def rows(self) -> Iterator[Row]:
        """Yields every row, read as it is asked for."""
        files = self.files()
        if not files:
            yield from self._hub_rows()
        splits = self.splits_by_name()
        for (name, path), split in zip(self._named(files), splits, strict=True):
            yield from islice(self._file_rows(path, name, split), self.limit)

    def splits_by_name(self) -> list[str | None]:
        """Returns the split of each file that its name suggests, or the one of all rows."""
        files, root = self.files(), Path(self.data)
        if self.split or len(files) == 1:
            return [self.split] * len(files)
        found = [_split_in(file.relative_to(root)) for file in files]
        if None in found:
            # A folder called dev, among others, may hold documents on development.
            texts = [Path(file.name) if is_text_file(file) else None for file in files]
            found = [_split_in(t) if t else s for t, s in zip(texts, found, strict=True)]
        return found

    def split_files(self) -> str:
        """Returns a sentence on the files whose names say their split, or nothing."""
        names = zip(map(self.name_of, self.files()), self.splits_by_name(), strict=True)
        named = [f"{name} ({split})" for name, split in names if split and not self.split]
        return " Files whose names say their split:" + itemize(named, 5) if named else ""

    def file_formats(self) -> dict[str, FileFormat]:
        """Returns how each file of rows is read, by its name."""
        options = self._options()
        lists = self._named(self.files())
        return {
            name: read_file(path, name, options).format
            for name, path in lists
            if is_data_file(path) or len(lists) == 1
        }

    def _options(self) -> ReadOptions:
        return ReadOptions(
            self.encoding,
            self.delimiter,
            self.sheet,
            self.text_unit,
            frozenset((self.columns or {}).values()),
        )

    def _file_rows(self, path: Path, name: str, split: str | None) -> Iterator[Row]:
        for row in read_file(path, name, self._options()).rows():
            yield row._replace(split=split or split_named(row.split))

    def _hub_rows(self) -> Iterator[Row]:
        found = hub_dataset(self.data, self.hub_config, self.hub_revision, self.streaming)
        for name, split in self._hub_names(list(found)).items():
            rows = enumerate(islice(stored_rows(found[name], self.data), self.limit), start=1)
            file = self.prefix + name
            yield from (Row(number, file, value, split=split) for number, value in rows)

    def _hub_names(self, offered: list[str]) -> dict[str, str | None]:
        if self.hub_splits is None:
            names = {name: _SPLIT_NAMES[name] for name in offered if name in _SPLIT_NAMES}
            missing: dict[str, str] = {}
        else:
            names = {theirs: ours for ours, theirs in self.hub_splits.items()}
            missing = {theirs: ours for theirs, ours in names.items() if theirs not in offered}
        if missing or "train" not in names.values():
            raise ConfigError(
                f"The dataset {self.data!r} has the splits {', '.join(offered)}, and "
                + (f"hub_splits names {', '.join(missing)}" if missing else "none is called train")
                + f'. Say which is which, such as hub_splits={{"train": "{offered[0]}"}}.'
            )
        if self.split is not None:
            # All of what is read belongs to the split that the user asked it for.
            return dict.fromkeys([n for n, ours in names.items() if ours == "train"], self.split)
        ours = list(names.values())
        # One split alone is shared out like a file.
        return {name: split if len(ours) > 1 else None for name, split in names.items()}


def named_apart(sources: Sequence[Source]) -> list[Source]:
    """Returns the sources of one data module, whose files have names of their own.

    Where several names could be the same, such as ``rows.jsonl`` in two folders, files are named
    relative to the folder that holds all of them, and splits on the hub with their dataset.
    """
    here = [one.data for one in sources if os.path.lexists(one.data)]
    local = {data: Path(os.path.abspath(data)) for data in here}
    remote = {one.data for one in sources} - local.keys()
    prefixes = {data: f"{data}/" for data in remote} if len(remote) > 1 else {}
    folders = {data: place if place.is_dir() else place.parent for data, place in local.items()}
    names = {place.name for place in local.values()}
    if len(local) > 1 and (len(names) < len(local) or any(map(Path.is_dir, local.values()))):
        try:
            common = os.path.commonpath(folders.values())
        except ValueError:
            # On Windows, drives have no folder in common.
            common = ""
        for data, folder in folders.items():
            inside = Path(os.path.relpath(folder, common)) if common else folder
            prefixes[data] = "" if inside == Path() else f"{inside.as_posix()}/"
    return [replace(one, prefix=prefixes.get(one.data, "")) for one in sources]


def split_named(name: object) -> str | None:
    """Returns the split that ``name`` stands for: ``"dev"`` is ``"validation"``."""
    return _SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None


def visible_files(folder: Path) -> list[Path]:
    """Returns the files in ``folder`` and below it, sorted, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        # A link to nothing is refused on reading, and not left out.
        if (path.is_file() or (path.is_symlink() and not path.exists()))
        # ~$: the lock file of a workbook that is open in Excel.
        and not any(part.startswith((".", "~$")) for part in path.relative_to(folder).parts)
    )


def _files_in(folder: Path) -> list[Path]:
    inside = visible_files(folder)
    # A folder of data often holds a page about it, which is not data.
    pages = [p for p in inside if p.suffix.lower() == ".md" or p.name in _PAGES]
    data = [path for path in inside if is_data_file(path) and path not in pages]
    if not data:
        names = [path.relative_to(folder).as_posix() for path in inside]
        raise ConfigError(
            f"The folder {folder.name!r} holds no data. Kinds that are read: "
            f"{', '.join(SUFFIXES)}. In it:" + (itemize(names) or " nothing")
        )
    return data


def _split_in(path: Path) -> str | None:
    """Returns the split that a path in a folder names: as a word of it, as on the hub.

    Names of documents are titles, of which a word may be any: there it is a whole name.
    """
    if is_text_file(path):
        names = [*path.parts[:-1], path.name.partition(".")[0]]
    else:
        names = re.split(r"[^a-z]+", path.as_posix().lower())
    return next(filter(None, map(split_named, names)), None)


def _no_such_file(path: Path) -> str:
    there = os.listdir(path.parent) if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=3)
    hint = f" Nearest names there: {', '.join(near)}." if near else ""
    start = "" if path.is_absolute() else f", which begins at {os.getcwd()!r}"
    return f"There is no file or folder {str(path)!r}.{hint} Check the path{start}."


def describe_formats(source: Source) -> list[dict[str, Any]]:
    """Returns how each file is read, ready for JSON: ``file``, ``words``, ``encoding`` ..."""
    return [
        {"file": name, "usual": one.is_standard, "words": one.describe(), **asdict(one)}
        for name, one in source.file_formats().items()
    ]


def log_formats(files: Sequence[dict[str, Any]]) -> None:
    """Logs how files are read, as a warning where it was detected and may be wrong."""
    for usual, level in ((True, logging.INFO), (False, logging.WARNING)):
        found = [f"{one['file']}: {one['words']}" for one in files if one["usual"] is usual]
        if found:
            log.log(level, f"Read as:{itemize(found)}")


def file_stamps(sources: Sequence[Source]) -> dict[str, tuple[int, int]]:
    """Returns size in bytes and time of change, in nanoseconds, of each file by its path."""
    paths = [path for source in sources for _, path in source.content()]
    stats = {str(path): path.stat() for path in paths if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


class SourceChanged(ConfigError):
    """Files changed while their rows were read, so nothing that was made of them is kept."""


def check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuses rows of files that changed while they were read."""
    changed = sorted(path for path in before.keys() | after if before.get(path) != after.get(path))
    if changed:
        names = ", ".join(Path(path).name for path in changed[:5])
        raise SourceChanged(
            f"{names} changed while the rows were read, so some would be of the old file and some "
            "of the new one. Start again once it is written; a file that another program still "
            "writes is copied first."
        )


def hub_dataset(data: str, config: str | None, revision: str | None, streaming: bool) -> Any:
    """Returns the splits of a dataset on the hub."""
    try:
        return load_dataset(data, config, revision=revision, streaming=streaming)
    # The library runs code of many others: requests, fsspec, pyarrow, pandas.
    except Exception as error:
        raise ConfigError(
            f"{data!r} is not a file or folder here, and the hub did not give a dataset of that "
            f"name: {_reason(error)}. Check the spelling, the network (HF_HUB_OFFLINE must not be "
            "set), hub_config, hub_revision, and `hf auth login` for a gated dataset."
        ) from error


def _reason(error: Exception) -> str:
    text, kind = str(error), type(error).__name__
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        names = re.search(r"\[(.*?)\]", text, re.DOTALL)
        listed = f" ({' '.join(names[1].split())[:300]})" if names else ""
        return f"it has several configurations{listed}, of which hub_config names one"
    if "trust_remote_code" in text or "scripts are no longer supported" in text:
        return "it is read by a script of its own, which is not run; look for a Parquet branch"
    if "gated" in text.lower():
        return "it is gated, and requests a login"
    if isinstance(error, DatasetNotFoundError) or kind == "RepositoryNotFoundError":
        return "there is none, or it is private"
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "Connect" in kind:
        return "the hub cannot be reached, and no copy of it is on this machine"
    return "its files cannot be read as rows"


def stored_rows(dataset: Any, data: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a split, images and sounds as their bytes, and classes by name."""
    features = dict(dataset.features or {})
    for name, feature in features.items():
        stored = _undecoded(feature)
        if stored is not feature:
            dataset = dataset.cast_column(name, stored)
    classes = {name: feature for name, feature in features.items() if has_classes(feature)}

    def explain(number: int, error: Exception) -> str:
        return (
            f"{data!r} on the hub cannot be read after row {number}: {_reason(error)}. Try again, "
            "name another hub_revision, or download its files and name their folder."
        )

    for row in explained_rows(dataset, explain):
        # What is kept as JSON has only the keys that it was given.
        nested = {
            n: without_nulls(v) for n, v in row.items() if type(features.get(n)).__name__ != "Json"
        }
        named = {n: with_class_names(nested.get(n, row[n]), kind) for n, kind in classes.items()}
        yield {**row, **nested, **named}


def _undecoded(feature: Any) -> Any:
    """Returns a feature of images or sounds, or of lists of them, as that of their bytes."""
    if getattr(feature, "decode", False) is True:
        return replace(feature, decode=False)
    inner = getattr(feature, "feature", None)
    stored = _undecoded(inner) if inner is not None else None
    return feature if stored is inner else replace(feature, feature=stored)


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Returns a hash of the names and bytes of files."""
    total = hashlib.sha256()
    for name, path in files:
        one = hashlib.sha256()
        with explain_errors(name), path.open("rb") as file:
            while block := file.read(1 << 20):
                one.update(block)
        total.update(json.dumps([name, one.hexdigest()]).encode())
    return total.hexdigest()


def digest_of_rows(rows: Iterable[Any]) -> str:
    """Returns a hash of rows, for data of which there is no file."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, default=repr, sort_keys=True).encode("utf-8"))
    return total.hexdigest()

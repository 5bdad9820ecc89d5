"""Reading rows from files, folders and the hub, each with its number."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import fsspec
from datasets import ClassLabel, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from lightning_peft.errors import ConfigError, itemize

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **{"training": "train", "testing": "test"},
    **dict.fromkeys(("valid", "val", "dev", "eval"), "validation"),
}
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_LINES = {".jsonl", ".ndjson"}
_COMPRESSED = {".gz", ".bz2", ".xz"}
SUFFIXES = sorted({*_LINES, ".json", *_BUILDERS})

TextUnit = Literal["line", "paragraph", "document"]


@dataclass(frozen=True)
class Row:
    """One row of the data as it was read.

    Attributes:
        number: Line of a JSONL or text file, else place among the rows; from 1.
        file: Name of its file, or of the hub's split.
        value: The columns; ``None`` where it could not be read.
        problem: Why it could not be read.
        split: ``"train"``, ``"validation"`` or ``"test"`` where the data says so.
    """

    number: int
    file: str
    value: dict[str, Any] | None = None
    problem: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        data: File, folder, or name on the hub.
        split: The split that every row belongs to; ``None`` leaves that to the data.
        hub_config: Configuration of a dataset on the hub.
        hub_splits: The hub's own name of each of our splits.
        hub_revision: Branch, tag or commit on the hub.
        streaming: Whether a dataset on the hub is read without storing it.
        limit: Most rows that are read from each file or split of the hub.
        text_unit: What is one row in a text file.
    """

    data: str
    split: str | None
    hub_config: str | None
    hub_splits: dict[str, str] | None
    hub_revision: str | None
    streaming: bool
    limit: int | None
    text_unit: TextUnit

    def files(self) -> list[Path]:
        """Returns the files, sorted; an empty list for a dataset on the hub.

        Raises:
            ConfigError: If the path does not exist, or holds no file of a known kind.
        """
        path = Path(self.data)
        if path.is_dir():
            return _files_in(path)
        if path.is_file():
            _suffix(path)
            return [path]
        if path.is_absolute() or self.data.startswith(".") or is_data_file(path):
            raise ConfigError(_no_such_file(path))
        return []

    def content(self) -> list[tuple[str, Path]]:
        """Returns every file that decides what the rows are, with its name in the folder."""
        root = Path(self.data)
        whole = root.is_dir()
        return [(p.relative_to(root).as_posix() if whole else p.name, p) for p in self.files()]

    def left_out(self) -> list[str]:
        """Returns the names of the files in the folder that are not read."""
        folder = Path(self.data)
        if not folder.is_dir():
            return []
        names = {path: path.relative_to(folder).as_posix() for path in visible_files(folder)}
        return [name for path, name in names.items() if path not in self.files()]

    def rows(self) -> Iterator[Row]:
        """Yields every row, read as it is asked for."""
        files = self.files()
        if not files:
            yield from self._hub_rows()
        for path in files:
            split = self.split or (_split_in(path, Path(self.data)) if len(files) > 1 else None)
            root = Path(self.data)
            name = path.relative_to(root).as_posix() if root.is_dir() else path.name
            yield from islice(self._file_rows(path, name, split), self.limit)

    def _file_rows(self, path: Path, name: str, split: str | None) -> Iterator[Row]:
        suffix = _suffix(path)
        if suffix in _LINES:
            yield from _json_lines(path, name, split)
        elif suffix == ".json":
            yield from _json_document(path, name, split)
        else:
            yield from self._built_rows(path, name, split, suffix)

    def _built_rows(self, path: Path, name: str, split: str | None, suffix: str) -> Iterator[Row]:
        builder = _BUILDERS[suffix]
        options: dict[str, Any] = {}
        if builder == "csv":
            separator = "\t" if suffix == ".tsv" else ","
            # Answers such as "NA", "007" or "1e3" are text, not missing values or numbers.
            features = Features(dict.fromkeys(_header(path, name, separator), Value("string")))
            options = {"sep": separator, "keep_default_na": False, "features": features}
        if builder == "text":
            options = {"sample_by": self.text_unit}
        try:
            found = load_dataset(
                builder, data_files=str(path), split="train", streaming=True, **options
            )
            for number, value in enumerate(_as_stored(found), start=1):
                if builder != "text" or str(value["text"]).strip():
                    yield Row(number, name, value, split=split)
        except (ValueError, OSError, DatasetGenerationError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(
                f"{name!r} cannot be read as {builder}: {reason}. Repair the file, or convert it "
                "to JSONL, in which one bad row does not hide the others."
            ) from error

    def _hub_rows(self) -> Iterator[Row]:
        options = {"revision": self.hub_revision, "streaming": self.streaming}
        try:
            found = load_dataset(self.data, self.hub_config, **options)
        except (OSError, ValueError, DatasetNotFoundError, DatasetGenerationError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{self.data!r} is no file or folder here, and the hub did not give a dataset of "
                f"that name ({reason}). Check the spelling, the network (HF_HUB_OFFLINE must not "
                "be set), hub_config, hub_revision, and `hf auth login` for a gated dataset."
            ) from error
        for name, split in self._hub_names(list(found)).items():
            rows = enumerate(islice(_as_stored(found[name]), self.limit), start=1)
            yield from (Row(number, name, value, split=split) for number, value in rows)

    def _hub_names(self, offered: list[str]) -> dict[str, str | None]:
        if self.hub_splits is None:
            names = {name: _SPLIT_NAMES[name] for name in offered if name in _SPLIT_NAMES}
            wanted: dict[str, str] = {}
        else:
            names = {theirs: ours for ours, theirs in self.hub_splits.items()}
            wanted = {theirs: ours for theirs, ours in names.items() if theirs not in offered}
        if wanted or "train" not in names.values():
            raise ConfigError(
                f"The dataset {self.data!r} has the splits {', '.join(offered)}, and "
                + (f"hub_splits names {', '.join(wanted)}" if wanted else "none is called train")
                + f'. Say which is which, such as hub_splits={{"train": "{offered[0]}"}}.'
            )
        if self.split is not None:
            # All of what is read belongs to the split that the user asked it for.
            return dict.fromkeys([n for n, ours in names.items() if ours == "train"], self.split)
        ours = list(names.values())
        # One split alone is shared out like a file.
        return {name: split if len(ours) > 1 else None for name, split in names.items()}


def _as_stored(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields rows with images and sounds as the bytes they are kept as, and classes by name."""
    features = dict(dataset.features or {})
    for name, feature in features.items():
        if getattr(feature, "decode", False) is True:
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    classes = {n: feature for n, feature in features.items() if isinstance(feature, ClassLabel)}
    for row in dataset:
        # -1 stands for a class that is kept secret, as in the test rows of a competition.
        secret = {name for name in classes if row[name] is None or row[name] < 0}
        named = {n: None if n in secret else kind.int2str(row[n]) for n, kind in classes.items()}
        yield {**row, **named}


def split_named(name: object) -> str | None:
    """Returns the split that ``name`` stands for: ``"dev"`` is ``"validation"``."""
    return _SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None


def is_data_file(path: Path) -> bool:
    """Says whether rows can be read from a file of this name."""
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return bare.suffix.lower() in SUFFIXES


def _suffix(path: Path) -> str:
    if not is_data_file(path):
        raise ConfigError(
            f"{path.name!r} is of no kind that can be read. Kinds: {', '.join(SUFFIXES)}, and "
            f"JSONL and JSON with {', '.join(sorted(_COMPRESSED))} after that."
        )
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return bare.suffix.lower()


def visible_files(folder: Path) -> list[Path]:
    """Returns the files in ``folder`` and below it, sorted, without hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _files_in(folder: Path) -> list[Path]:
    inside = visible_files(folder)
    # A folder of data often holds a page about it, which is no data.
    pages = [path for path in inside if path.suffix.lower() == ".md"]
    data = [path for path in inside if is_data_file(path) and path not in pages]
    if not data:
        names = [path.relative_to(folder).as_posix() for path in inside]
        raise ConfigError(
            f"The folder {folder.name!r} holds no data. Kinds that are read: "
            f"{', '.join(SUFFIXES)}. In it:" + (itemize(names) or " nothing")
        )
    return data


def _split_in(path: Path, folder: Path) -> str | None:
    parts = path.relative_to(folder).parts
    words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower()) if word]
    return next((_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES), None)


def _no_such_file(path: Path) -> str:
    there = os.listdir(path.parent) if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=3)
    hint = f" Nearest names there: {', '.join(near)}." if near else ""
    return f"There is no file or folder {str(path)!r}.{hint} Check the path."


def _header(path: Path, name: str, separator: str) -> list[str]:
    options = {"encoding": "utf-8-sig", "newline": "", "compression": "infer"}
    with fsspec.open(str(path), "rt", **options) as file:
        header, first = islice(chain(csv.reader(file, delimiter=separator), ([], [])), 2)
    repeated = [column for column, count in Counter(header).items() if count > 1]
    if repeated or len(first) > len(header):
        what = f"the columns {repeated} twice" if repeated else f"{len(first)} fields in row 1"
        raise ConfigError(
            f"{name!r} has {what} below the {len(header)} column names {header}. Its first line "
            "names each column once."
        )
    return header


def _json_lines(path: Path, name: str, split: str | None) -> Iterator[Row]:
    with fsspec.open(str(path), "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            # utf-8-sig: some editors on Windows put a mark at the start of the file.
            value, problem = _object(line, "utf-8-sig" if number == 1 else "utf-8")
            if value is not None or problem is not None:
                yield Row(number, name, value, problem, split)


def _object(line: bytes, encoding: str) -> tuple[dict[str, Any] | None, str | None]:
    try:
        text = line.decode(encoding)
        if not text.strip():
            return None, None
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start + 1})"
    except ValueError as error:
        return None, f"is no JSON: {error}"
    return _checked(value)


def _checked(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    if not isinstance(value, dict):
        return None, f"is a JSON {type(value).__name__}, not an object with named fields"
    return value, None


def _json_document(path: Path, name: str, split: str | None) -> Iterator[Row]:
    with fsspec.open(str(path), "rb", compression="infer") as file:
        content = file.read()
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        hint = ""
        if len(content.splitlines()) > 1 and _object(content.splitlines()[0], "utf-8-sig")[0]:
            hint = " Its first line alone is JSON: if every line is, name the file .jsonl."
        raise ConfigError(f"{name!r} is no JSON: {error}.{hint} Repair the file.") from error
    if isinstance(found, dict):
        lists = [key for key, value in found.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise ConfigError(
                f"{name!r} holds one JSON object with {len(lists)} lists. Rows are expected as a "
                "list of objects, or as the only list of one object."
            )
        found = found[lists[0]]
    if not isinstance(found, list):
        raise ConfigError(f"{name!r} holds a JSON {type(found).__name__}, not a list of objects.")
    for number, entry in enumerate(found, start=1):
        value, problem = _checked(entry)
        yield Row(number, name, value, problem, split)

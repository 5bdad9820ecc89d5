"""Rows that name or hold media files: images, also in folders of classes, or recordings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

from lightning_peft.compat.datasets import tqdm
from lightning_peft.data.file_format import Row
from lightning_peft.data.image_turns import named_paths, with_paths
from lightning_peft.data.reading import Source, is_data_file, split_named, visible_files
from lightning_peft.errors import ConfigError, itemize

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SOUNDS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"}
_TEXTS = (".txt", ".md")


@dataclass(frozen=True)
class MediaSource(Source):
    """Rows whose paths of media files, which are relative to their list, are made absolute."""

    media_field: ClassVar[str]

    def named_files(self) -> list[Path]:
        rows = self.rows() if self.files() else iter(())
        found = {self._named_in(row)[1] for row in rows}
        return sorted(Path(path) for path in found if path and os.path.isfile(path))

    def _file_rows(self, path: Path, name: str, split: str | None) -> Iterator[Row]:
        for row in super()._file_rows(path, name, split):
            column, named = self._named_in(row)
            if row.value is not None and column is not None and named:
                value, placed = row.value[column], str((path.parent / named).absolute())
                row.value[column] = placed if isinstance(value, str) else {"path": placed}
            yield row

    def _named_in(self, row: Row) -> tuple[str | None, str | None]:
        """Returns the column of a row that holds media, and the path in it."""
        column = None if row.value is None else self.column_of(self.media_field, row.value)
        return column, None if row.value is None or column is None else _path_in(row.value[column])


def _path_in(value: Any) -> str | None:
    """Returns the path in a cell; next to bytes, it is only the name they once had."""
    if isinstance(value, dict) and not value.get("bytes"):
        value = value.get("path")
    return value if isinstance(value, str) and value.strip() else None


def _with_named_files(source: MediaSource, found: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """Returns files of rows and those that they name, each with its name seen from the folder."""
    if not found:
        return found
    folder = Path(source.data) if Path(source.data).is_dir() else Path(source.data).parent
    named = source.named_files()
    return [*found, *((Path(os.path.relpath(p, folder)).as_posix(), p) for p in named)]


@dataclass(frozen=True)
class AudioSource(MediaSource):
    """Rows of a recording and its transcript."""

    media_field = "audio"

    def left_out(self) -> list[str]:
        """Returns the files in the folder that are neither rows nor recordings."""
        return [name for name in super().left_out() if Path(name).suffix.lower() not in _SOUNDS]


@dataclass(frozen=True)
class ImageTextSource(MediaSource):
    """Conversations with images, in a column of their own or inside of the turns."""

    media_field = "images"

    def named_files(self) -> list[Path]:
        rows = self.rows() if self.files() else iter(())
        found = {p for row in rows if row.value for p in named_paths(row.value, self._names(row))}
        return sorted(Path(path) for path in found if os.path.isfile(path))

    def content(self) -> list[tuple[str, Path]]:
        """Returns the files of rows and the images that they name, each with its name."""
        return self._content

    @cached_property
    def _content(self) -> list[tuple[str, Path]]:
        return _with_named_files(self, super().content())

    def left_out(self) -> list[str]:
        """Returns the files in the folder that are neither rows nor images."""
        return [name for name in super().left_out() if Path(name).suffix.lower() not in IMAGES]

    def _file_rows(self, path: Path, name: str, split: str | None) -> Iterator[Row]:
        for row in Source._file_rows(self, path, name, split):
            if row.value is None:
                yield row
                continue
            placed = with_paths(
                row.value, self._names(row), lambda one: str((path.parent / one).absolute())
            )
            yield row._replace(value=placed)

    def _names(self, row: Row) -> dict[str, str]:
        assert row.value is not None
        fields = ("images", "messages", "prompt", "completion")
        found = {ours: self.column_of(ours, row.value) for ours in fields}
        return {ours: theirs for ours, theirs in found.items() if theirs is not None}


@dataclass(frozen=True)
class ImageSource(MediaSource):
    """Rows of an image and its class.

    A folder without files of rows holds one folder for each class, or ``train`` and ``validation``
    with those in them.
    """

    media_field = "image"

    @cached_property
    def _pictures(self) -> list[Path]:
        """The images of a folder of classes, sorted; none if ``data`` is anything else."""
        folder = Path(self.data)
        inside = visible_files(folder) if folder.is_dir() else []
        if any(is_data_file(path) and path.suffix.lower() not in _TEXTS for path in inside):
            return []
        found = [path for path in inside if path.suffix.lower() in IMAGES]
        if folder.is_dir() and not found:
            names = [path.relative_to(folder).as_posix() for path in inside]
            raise ConfigError(
                f"The folder {folder.name!r} holds no images ({', '.join(IMAGES)}) and no files "
                "that list some. In it:" + (itemize(names) or " nothing")
            )
        return found

    def files(self) -> list[Path]:
        """Returns the lists or, of a folder of classes, the images."""
        return self._pictures or super().files()

    def content(self) -> list[tuple[str, Path]]:
        """Returns the files and, of lists, the images that they name, each with its name."""
        return self._content

    @cached_property
    def _content(self) -> list[tuple[str, Path]]:
        found = super().content()
        return found if self._pictures else _with_named_files(self, found)

    def left_out(self) -> list[str]:
        """Returns the names of files in the folder that are not read, and of empty folders."""
        folder = Path(self.data)
        if not folder.is_dir():
            return []
        used = {path.resolve() for _, path in self.content()}
        unused = [path for path in visible_files(folder) if path.resolve() not in used]
        # A class without a file would silently be missing from the labels.
        empty = sorted(
            path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())
        )
        names = [self.name_of(path) for path in unused]
        return names + [f"{self.name_of(path)}/ (empty)" for path in empty]

    def rows(self) -> Iterator[Row]:
        """Yields every row; of a folder of classes, its images by name."""
        found = self._rows_of_classes() if self._pictures else super().rows()
        # A bar, where it takes long and somebody watches.
        yield from tqdm(found, desc="Reading images", delay=2, disable=None)

    @cached_property
    def _by_split(self) -> bool:
        """Whether the folders in ``data`` are splits, with the folders of classes in them."""
        above = [path.relative_to(self.data).parent.parts for path in self._pictures]
        tops = {parts[0] for parts in above if parts}
        # A folder called train may also hold pictures of trains.
        deep = sorted({parts[0] for parts in above if len(parts) > 1 and split_named(parts[0])})
        others = sorted(top for top in tops if not split_named(top))
        if deep and others:
            raise ConfigError(
                f"The folder {Path(self.data).name!r} holds folders of classes in "
                f"{', '.join(deep)}, and next to them {', '.join(others)}, which is not a split. "
                "Move it into one of them, or name the folders apart with data= and "
                "validation_data=."
            )
        return bool(tops) and not others

    def _rows_of_classes(self) -> Iterator[Row]:
        numbered = enumerate(self._pictures, start=1)
        for _, group in groupby(numbered, key=lambda one: one[1].parent):
            for number, path in islice(group, self.limit):
                name = path.relative_to(self.data)
                split, parts = self.split, name.parent.parts
                if self._by_split and parts:
                    split, parts = split or split_named(parts[0]), parts[1:]
                value = {"image": str(path), "label": parts[0] if parts else ""}
                yield Row(number, self.name_of(path), value, split=split)

"""Sources of media files: images, class folders and audio."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar

from lightning_peft.compat.datasets import tqdm
from lightning_peft.data.file_format import Row
from lightning_peft.data.image_turns import with_paths
from lightning_peft.data.reading import Source, is_data_file, split_named, visible_files
from lightning_peft.errors import ConfigError, itemize

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEXTS = (".txt", ".md")


@dataclass(frozen=True)
class MediaSource(Source):
    """Rows whose paths of media files, which are relative to their list, are made absolute."""

    media_field: ClassVar[str]
    # Of media files, which rows name and which are not left out.
    suffixes: ClassVar[tuple[str, ...]]

    def named_files(self) -> list[Path]:
        rows = self.rows() if self.files() else iter(())
        found = {path for row in rows if row.value for path in self._paths_in(row.value)}
        return sorted(Path(path) for path in found if os.path.isfile(path))

    def left_out(self) -> list[str]:
        """Returns the files in the folder that are neither rows nor media."""
        found = super().left_out()
        return [name for name in found if Path(name).suffix.lower() not in self.suffixes]

    def _file_rows(self, path: Path, name: str, split: str | None) -> Iterator[Row]:
        for row in super()._file_rows(path, name, split):
            placed = row.value and self._placed(
                row.value, lambda one: str((path.parent / one).absolute())
            )
            yield row._replace(value=placed)

    def _placed(self, row: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
        """Returns a row with its paths changed by ``place``."""
        path, column = next(self._paths_in(row), None), self.column_of(self.media_field, row)
        if path is None or column is None:
            return row
        placed = place(path)
        return {**row, column: placed if isinstance(row[column], str) else {"path": placed}}

    def _paths_in(self, row: Mapping[str, Any]) -> Iterator[str]:
        """Yields the paths in a row; next to bytes, one is only the name they once had."""
        column = self.column_of(self.media_field, row)
        value = None if column is None else row[column]
        if isinstance(value, dict) and not value.get("bytes"):
            value = value.get("path")
        if isinstance(value, str) and value.strip():
            yield value


@dataclass(frozen=True)
class AudioSource(MediaSource):
    """Rows of a recording and its transcript."""

    media_field = "audio"
    suffixes = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac")


@dataclass(frozen=True)
class _WithNamedFiles(MediaSource):
    """Rows that are what the images are that they name."""

    suffixes = IMAGES

    def content(self) -> list[tuple[str, Path]]:
        """Returns the files of rows and the images that they name, each with its name."""
        return self._content

    @cached_property
    def _content(self) -> list[tuple[str, Path]]:
        found = super().content()
        if not found:
            return found
        folder = Path(self.data) if Path(self.data).is_dir() else Path(self.data).parent
        named = self.named_files()
        return [*found, *((Path(os.path.relpath(p, folder)).as_posix(), p) for p in named)]


@dataclass(frozen=True)
class ImageTextSource(_WithNamedFiles):
    """Conversations with images, in a column of their own or inside of the turns."""

    def _placed(self, row: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
        return with_paths(row, self._names(row), place)

    def _paths_in(self, row: Mapping[str, Any]) -> Iterator[str]:
        found: dict[str, str] = {}
        with_paths(row, self._names(row), lambda path: found.setdefault(path, path))
        yield from found

    def _names(self, row: Mapping[str, Any]) -> dict[str, str]:
        fields = ("images", "messages", "prompt", "completion")
        found = {ours: self.column_of(ours, row) for ours in fields}
        return {ours: theirs for ours, theirs in found.items() if theirs is not None}


@dataclass(frozen=True)
class ImageSource(_WithNamedFiles):
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

    def named_files(self) -> list[Path]:
        return [] if self._pictures else super().named_files()

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
                split, label = self._place_of(path)
                value = {"image": str(path), "label": label}
                yield Row(number, self.name_of(path), value, split=split)

    def _place_of(self, path: Path) -> tuple[str | None, str]:
        """Returns the split and the class that the folders of an image say."""
        split, parts = self.split, path.relative_to(self.data).parent.parts
        if self._by_split and parts:
            split, parts = split or split_named(parts[0]), parts[1:]
        return split, parts[0] if parts else ""

    def splits_by_name(self) -> list[str | None]:
        """Returns the split of each file that its name suggests, or the one of all rows."""
        if not self._pictures:
            return super().splits_by_name()
        return [self._place_of(path)[0] for path in self._pictures]

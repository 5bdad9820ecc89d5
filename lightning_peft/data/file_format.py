"""File formats: detected, requested and resulting options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_peft.data.charsets import Charset
from lightning_peft.data.open_files import compression_of, open_file

TextUnit = Literal["line", "paragraph", "document"]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes", " ": "spaces"}
_ENCODINGS = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8 with a mark at its start"}
# What needs no second look.
_USUAL = {"utf-8", "utf-8-sig"}


class Row(NamedTuple):
    """One row of the data, or the ``problem`` for which it has no value.

    ``number`` is the line in JSONL or text files, else the place among the rows, from 1; ``file``
    may be a split of the hub; ``split`` is the one that the data names.
    """

    number: int
    file: str
    value: dict[str, Any] | None = None
    problem: str | None = None
    split: str | None = None


class ClassName(str):
    """The name of a class that data keeps as a number, of which ``labels=`` may have another."""

    number: int
    # Of all classes, in the order of their numbers.
    names: Sequence[str]

    @classmethod
    def of(cls, number: int, names: Sequence[str]) -> ClassName:
        """Returns the name of the class of a number."""
        found = cls(names[number])
        found.number, found.names = number, names
        return found


@dataclass(frozen=True)
class ReadOptions:
    """How files are to be read; ``None`` detects it."""

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | int | None = None
    text_unit: TextUnit = "line"
    # Columns that the user maps to fields: names of a header, as those that are known.
    columns: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FileFormat:
    """How a file is read.

    ``encoding_by`` is ``"given"``, ``"mark"``, ``"sure"`` or ``"guessed"``, ``example`` a line in
    which a guess matters; ``notes`` are anything else that a user should check.
    """

    kind: str
    compression: str | None = None
    encoding: str | None = None
    encoding_by: str | None = None
    example: str = ""
    delimiter: str | None = None
    sheet: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_standard(self) -> bool:
        """Whether there is nothing that a user should look at."""
        delimiters = {"CSV": ",", "TSV": "\t"}
        plain = self.encoding is None or self.encoding in _USUAL
        parted = self.delimiter is None or delimiters.get(self.kind) == self.delimiter
        return plain and parted and self.sheet is None and not self.notes

    def describe(self) -> str:
        """Returns all of it in a line."""
        parts = [self.kind]
        if self.compression is not None:
            parts.append(f"compressed by {self.compression}")
        if self.encoding is not None:
            shown = _ENCODINGS.get(self.encoding, self.encoding)
            by = {
                "given": " as asked for",
                "guessed": f" by a guess (a line of it: {self.example})",
            }
            parts.append(f"in {shown}{by.get(self.encoding_by or '', '')}")
        if self.delimiter is not None:
            parts.append(
                f"columns parted by {DELIMITERS.get(self.delimiter, repr(self.delimiter))}"
            )
        if self.sheet is not None:
            parts.append(f"sheet {self.sheet!r}")
        text = ", ".join(parts) + "".join(f"; {note}" for note in self.notes)
        if self.encoding_by == "guessed":
            text += '. If the line looks wrong, say encoding=, such as encoding="cp1250"'
        return text


@dataclass(frozen=True)
class TextFile:
    """A file of text: its path, its name in messages, and its encoding."""

    path: Path
    name: str
    charset: Charset

    @contextmanager
    def open(
        self, errors: str | None = None, newline: str | None = None
    ) -> Iterator[TextIOWrapper]:
        """Opens it; by default, bytes that cannot be decoded become surrogates."""
        default = "strict" if self.charset.whole else "surrogateescape"
        with open_file(self.path, self.name) as file:
            text = TextIOWrapper(file, self.charset.name, errors or default, newline)
            yield text
            # Closing is up to `open_file`.
            text.detach()

    def format(self, kind: str, **more: Any) -> FileFormat:
        """Returns how it is read."""
        charset, compression = self.charset, compression_of(self.path)
        return FileFormat(kind, compression, charset.name, charset.how, charset.example, **more)


@dataclass(frozen=True)
class ReadableFile:
    """A file's format, and an iterator over its rows that starts from the first one each time."""

    format: FileFormat
    rows: Callable[[], Iterator[Row]]

"""How a file is read: what was detected, what the user said, and what of it is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lightning_peft.data.charsets import Charset

TextUnit = Literal["line", "paragraph", "document"]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "pipes", " ": "spaces"}
_ENCODINGS = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8 with a mark at its start"}
# What needs no second look.
_USUAL = {"utf-8", "utf-8-sig"}


class FileRow(NamedTuple):
    """One row of a file.

    Attributes:
        number: Its number, from 1.
        value: Its columns; ``None`` where it cannot be read.
        problem: Why it cannot be read.
        split: The split that the file says it is for.
    """

    number: int
    value: dict[str, Any] | None
    problem: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What the user says of files.

    Attributes:
        encoding: Encoding of text files; ``None`` detects it.
        delimiter: What parts the columns of a table; ``None`` detects it.
        sheet: Name of a sheet, or its number from 1; ``None`` detects it.
        text_unit: What is one row of a text file.
    """

    encoding: str | None = None
    delimiter: str | None = None
    sheet: str | int | None = None
    text_unit: TextUnit = "line"


@dataclass(frozen=True)
class FileFormat:
    """How a file is read.

    Attributes:
        kind: Such as ``"CSV"`` or ``"JSON lines"``.
        compression: How it is compressed, such as ``"gzip"``.
        encoding: Python's name of the encoding of its text.
        encoding_by: ``"given"``, ``"mark"``, ``"sure"`` or ``"guessed"``.
        example: A line in which a guessed encoding matters.
        delimiter: What parts the columns.
        sheet: The sheet of a workbook.
        notes: What else is to be known, such as columns that are left out.
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


def text_format(kind: str, charset: Charset, compression: str | None, **more: Any) -> FileFormat:
    """Returns how a file of text is read.

    Args:
        kind: Of the file.
        charset: Its encoding.
        compression: How it is compressed.
        **more: Other attributes of :class:`FileFormat`.
    """
    return FileFormat(kind, compression, charset.name, charset.how, charset.example, **more)


@dataclass(frozen=True)
class ReadableFile:
    """A file that can be read.

    Attributes:
        format: How it is read.
        rows: Yields its rows, from the first one each time.
    """

    format: FileFormat
    rows: Callable[[], Iterator[FileRow]]

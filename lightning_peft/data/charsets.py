"""Detection of text encodings."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from encodings.aliases import aliases
from itertools import chain, islice
from typing import Any, Literal

import charset_normalizer

from lightning_peft.errors import ConfigError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # Before UTF-16, whose mark begins this one.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LATIN = ("cp1252", "cp1250", "mac_roman", "cp850")
_OTHER = (
    *("cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "cp1254"),
    *("cp932", "gb18030", "big5", "euc_kr", "euc_jp"),
)
# Letters of Western Europe. Others that cp1252 has are those of neighbouring code pages misread.
_WESTERN = set("àáâãäåæçèéêëìíîïñòóôõöøùúûüýÿßœšžÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝŒŠŽŸðþÐÞ")
_NEIGHBOURS = {
    "cp1254": ("Turkish",),
    "cp1250": ("Czech", "Slovak", "Polish", "Hungarian", "Croatian", "Slovene", "Romanian"),
}
_BETWEEN_LETTERS = set("'’‘-–—·\u00ad\u00a0“”«»…/&@€")
# What files of rows are written in, the first near names of one that is misspelled.
_COMMON = (
    *("utf-8", "utf-8-sig", "utf-16", "cp1252", "cp1250", "cp1251", "latin-1", "iso8859-15"),
    *("mac-roman", "cp850", "koi8-r", "shift-jis", "cp932", "gb18030", "big5", "euc-kr", "euc-jp"),
)
# Python's names of other text; not of bytes in another form such as base64, or of text in ASCII.
_NOT_TEXT = ("mbcs", "rot_13", "tactis", "utf_7")
_NAMES = sorted(
    name.replace("_", "-")
    for alias, codec in aliases.items()
    if not codec.endswith("_codec") and codec not in _NOT_TEXT
    for name in {alias, codec}
    if name.islower()
)
_BLOCK, _SAMPLE = 1 << 20, 1 << 16

Blocks = Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Charset:
    """The encoding of a file, by Python's name.

    ``how`` is ``"given"`` by the user, by a ``"mark"`` at the start, by the bytes (``"sure"``), or
    ``"guessed"`` with a line as ``example``; ``whole`` is False if some lines cannot be decoded.
    """

    name: str
    how: Literal["given", "mark", "sure", "guessed"]
    example: str = ""
    whole: bool = True


def detect(blocks: Blocks, name: str, requested: str | None = None) -> Charset:
    """Returns the encoding of a file, in one or two passes over its ``blocks`` of bytes."""
    start = next(iter(blocks()), b"")
    if requested is not None:
        return _checked_encoding(blocks, name, requested)
    marked = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
    if marked == "utf-8-sig":
        return Charset(marked, "mark", whole=_first_undecodable(blocks, "utf-8") is None)
    if marked is not None:
        return Charset(_check_decodable(blocks, name, marked), "mark")
    if b"\0" in start[:_SAMPLE]:
        return Charset(
            _check_decodable(blocks, name, _wide_encoding(start[:_SAMPLE], name)), "sure"
        )
    sound, unsound = _utf8(blocks)
    if not unsound:
        return Charset("utf-8", "sure")
    if _first_undecodable(blocks, "utf-8", "surrogatepass") is None:
        raise ConfigError(
            f"{name!r} is UTF-8 in which a character such as an emoji is written as two halves "
            "(CESU-8), as Java and Oracle write it. Convert it: "
            "python -c \"import sys; a, b = sys.argv[1:]; t = open(a, 'rb').read()"
            ".decode('utf-8', 'surrogatepass'); t = t.encode('utf-16', 'surrogatepass'); "
            f"open(b, 'wb').write(t.decode('utf-16').encode())\" {name} "
            f"utf8-{name.rpartition('/')[2]}"
        )
    # A few damaged bytes in what is UTF-8 everywhere else.
    if sound >= unsound:
        return Charset("utf-8", "sure", whole=False)
    return _guess(blocks, name)


def _checked_encoding(blocks: Blocks, name: str, requested: str) -> Charset:
    try:
        found = codecs.lookup(requested)
        "".encode(found.name)
    except (LookupError, ValueError) as error:
        near = near_encodings(requested)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise ConfigError(f"encoding={requested!r} is not an encoding of Python.{hint}") from error
    # A mark at the start is never part of the text.
    encoding = "utf-8-sig" if found.name == "utf-8" else found.name
    fault = _first_undecodable(blocks, encoding)
    if fault is not None:
        raise ConfigError(
            f"{name!r} is not in encoding={requested!r}: byte {fault + 1:,} does not exist in it. "
            "Leave encoding out, and it is detected."
        )
    return Charset(encoding, "given")


def near_encodings(requested: str) -> list[str]:
    """Returns Python's names of at most four text encodings that look like ``requested``."""

    def near(names: Iterable[str], count: int) -> list[str]:
        plain = {re.sub("[^a-z0-9]", "", name): name for name in names}
        wanted = re.sub("[^a-z0-9]", "", requested.lower())
        return [plain[name] for name in get_close_matches(wanted, plain, n=count)]

    # One encoding has several names.
    first: dict[str, str] = {}
    for name in near(_COMMON, 2) + near(_NAMES, 4):
        first.setdefault(codecs.lookup(name).name, name)
    return list(first.values())[:4]


def _check_decodable(blocks: Blocks, name: str, encoding: str) -> str:
    fault = _first_undecodable(blocks, encoding)
    if fault is not None:
        raise ConfigError(
            f"{name!r} is {encoding.upper()} by its first bytes, and damaged or cut off at byte "
            f"{fault + 1:,}. Write it once more, in UTF-8."
        )
    return encoding


def _first_undecodable(blocks: Blocks, encoding: str, errors: str = "strict") -> int | None:
    """Returns the place of the first byte that cannot be decoded."""
    decoder, place = codecs.getincrementaldecoder(encoding)(errors), 0
    try:
        for block in blocks():
            held = len(decoder.getstate()[0])
            start = place - held
            place += len(block)
            decoder.decode(block)
        start = place - len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        return start + getattr(error, "start", 0)
    return None


def _wide_encoding(start: bytes, name: str) -> str:
    """Returns which UTF-16 or UTF-32 without a mark some bytes are; no other text has zeros."""
    zero = start.index(0)
    # Whole characters; the zero itself may be in what is left over.
    start = start[: len(start) // 4 * 4 or len(start) // 2 * 2]

    def plain(encoding: str) -> float:
        text = start.decode(encoding, "replace")
        good = sum(char.isascii() and (char.isprintable() or char.isspace()) for char in text)
        return good / max(1, len(text))

    found = max(("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"), key=plain)
    text = start.decode(found, "replace")
    # Unassigned, private, halves, and controls that no text has.
    kinds = [unicodedata.category(char) for char in text if char not in "\t\r\n\f"]
    odd = sum(kind in ("Cc", "Cn", "Co", "Cs") for kind in kinds)
    if plain(found) < 0.05 or 50 * odd > len(text):
        raise ConfigError(
            f"{name!r} holds bytes that are not text (a zero at byte {zero + 1:,}). It "
            "is damaged, or of another kind than its name suggests."
        )
    return found


def _utf8(blocks: Blocks) -> tuple[int, int]:
    """Returns how many characters above ASCII are UTF-8, and how many bytes are not."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    sound = unsound = 0
    for block in chain(filter(None, blocks()), [b""]):
        text = decoder.decode(block, final=not block)
        if not text.isascii():
            escaped = sum("\udc80" <= char <= "\udcff" for char in text)
            unsound += escaped
            sound += sum(char > "\x7f" for char in text) - escaped
    return sound, unsound


def _guess(blocks: Blocks, name: str) -> Charset:
    sample = b"".join(islice(_lines_above_ascii(blocks), 400))[:_SAMPLE]
    controls = sum(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in sample)
    fitting = [c for c in (*_LATIN, *_OTHER) if _first_undecodable(blocks, c) is None]
    if controls > len(sample) / 200 or not fitting:
        raise ConfigError(
            f"{name!r} holds bytes that are not text in UTF-8 or another encoding that is known "
            "here. It is damaged, or of another kind than its name suggests. If it is text, say "
            'which with encoding=, such as encoding="cp1252".'
        )
    found = _best(sample, fitting, name)
    return Charset(found, "guessed", _example(sample.decode(found, "replace")))


def _lines_above_ascii(blocks: Blocks) -> Iterator[bytes]:
    rest = b""
    for block in blocks():
        *lines, rest = (rest + block).split(b"\n")
        # A text without any line end is a sample of its own.
        if len(rest) > _BLOCK:
            lines, rest = [*lines, rest], b""
        yield from (line + b"\n" for line in lines if not line.isascii())
    if not rest.isascii():
        yield rest


def _best(sample: bytes, fitting: list[str], name: str) -> str:
    marks: Any = charset_normalizer.from_bytes(sample, cp_isolation=fitting)
    if "cp1252" in fitting and _is_western(sample.decode("cp1252", "ignore")):
        return _neighbour(marks, fitting) or "cp1252"
    texts = {encoding: sample.decode(encoding, "replace") for encoding in fitting}
    ranked = sorted((float(m.chaos) - float(m.coherence), m.encoding) for m in marks)
    ranked = [one for one in ranked if one[1] in texts and not _is_jumbled(texts[one[1]])]
    close = [e for rank, e in ranked if rank <= ranked[0][0] + 0.05]
    close = list({texts[encoding]: encoding for encoding in reversed(close)}.values())[::-1]
    if len(close) == 1:
        return close[0]
    close = close or fitting
    shown = "".join(f"\n  encoding={e!r}: {_example(texts[e])}" for e in close[:6])
    raise ConfigError(
        f"{name!r} is not UTF-8, and too little of it is above ASCII to know what else. Say which "
        f"encoding reads it right:{shown}\nOr convert it: iconv -f {close[0].upper()} -t UTF-8 "
        f"{name} > utf8-{name.rpartition('/')[2]}"
    )


def _neighbour(marks: Any, fitting: list[str]) -> str | None:
    """Returns a code page that the language surely needs; the library likes cp1250 for any."""
    found = {match.encoding: match for match in marks if match.encoding in fitting}
    western = found.get("cp1252")
    for encoding, languages in _NEIGHBOURS.items():
        match = found.get(encoding)
        if match is None or match.language not in languages or western is None:
            continue
        gains = match.coherence - western.coherence, western.chaos - match.chaos
        if match.coherence > 0.3 and (gains[0] > 0.02 or gains[1] > 0.05):
            return encoding
    return None


def _is_western(text: str) -> bool:
    """Returns whether a text that was decoded as cp1252 looks as if it was that."""
    letters = above = 0
    for place, char in enumerate(text):
        letters += char.isalpha()
        if char.isascii():
            continue
        before, after = text[place - 1 : place], text[place + 1 : place + 2]
        if char.isalpha() and char not in "ªºµƒ":
            above += 1
            # "ZŸrich": a capital in a word.
            if char not in _WESTERN or (char.isupper() and before.islower()):
                return False
        else:
            inside = before.isalpha() and after.isalpha() and char not in _BETWEEN_LETTERS
            control = unicodedata.category(char).startswith("C") and char != "\u00ad"
            if inside or control:
                return False
    return above <= 0.4 * letters or letters < 8


def _is_jumbled(text: str) -> bool:
    """Returns whether words have capitals inside, as where another script is misread."""
    pairs = [(a, b) for a, b in zip(text, text[1:], strict=False) if not b.isascii()]
    return 20 * sum(a.islower() and b.isupper() for a, b in pairs) > len(pairs)


def _example(text: str) -> str:
    """Returns the part of a text around its first character above ASCII."""
    line = next((line for line in text.splitlines() if not line.isascii()), text)
    place = next((i for i, char in enumerate(line) if not char.isascii()), 0)
    start = max(0, place - 20)
    return repr(("..." if start else "") + line[start : place + 40].strip())

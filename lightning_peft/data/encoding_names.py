"""Names of encodings that Python knows, for one that is misspelled."""

from __future__ import annotations

import codecs
import encodings
import re
from difflib import get_close_matches
from encodings.aliases import aliases
from pkgutil import iter_modules

# What files of rows are written in, first where several names are as near.
_COMMON = (
    *("utf-8", "utf-8-sig", "utf-16", "cp1252", "cp1250", "cp1251", "latin-1", "iso8859-15"),
    *("mac-roman", "cp850", "koi8-r", "shift-jis", "cp932", "gb18030", "big5", "euc-kr", "euc-jp"),
)

# Spellings of Unicode inside other text.
_ESCAPES = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "utf_7", "undefined"}


def near_encodings(requested: str) -> list[str]:
    """Returns Python's names of at most four text encodings that look like ``requested``."""
    plain_name = _plain(requested)
    common = {_plain(name): name for name in _COMMON}
    known = {_plain(name): name for name in _known()}
    near = [common[name] for name in get_close_matches(plain_name, common, n=2)]
    near += [known[name] for name in get_close_matches(plain_name, known, n=4)]
    # One encoding has several names.
    first: dict[str, str] = {}
    for name in near:
        first.setdefault(codecs.lookup(name).name, name)
    return list(first.values())[:4]


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _known() -> list[str]:
    found = []
    for name in sorted({*aliases, *(module.name for module in iter_modules(encodings.__path__))}):
        try:
            if aliases.get(name, name) in _ESCAPES:
                continue
            "".encode(codecs.lookup(name).name)
        # Of another system, a part of the package, or bytes in another form such as base64.
        except (LookupError, ValueError):
            continue
        found.append(name.replace("_", "-"))
    return found

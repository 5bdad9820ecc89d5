"""Texts of the page: ``texts/<language>/<area>.json``, with equal keys in each language."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from urllib.parse import urlencode

LANGUAGES = {"en": "English", "de": "Deutsch"}
DEFAULT = "en"
_GERMAN_SEPARATORS = str.maketrans(",.", ".,")


@cache
def _load(language: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted((Path(__file__).parent / language).glob("*.json")):
        area = json.loads(file.read_text(encoding="utf-8"))
        found |= {f"{file.stem}.{key}": text for key, text in area.items()}
    return found


class Texts:
    """The texts of one language.

    ``t("run.step", step=3)`` is the text ``step`` of ``run.json`` with ``{step}`` filled in.
    """

    def __init__(self, language: str = DEFAULT) -> None:
        self.language = language
        self._texts = _load(language)

    def __call__(self, key: str, **values: object) -> str:
        """Returns a text; an unknown key or a missing value is a KeyError."""
        return self._texts[key].format(**values)

    def number(self, value: float, digits: int = 0) -> str:
        """Returns a number as it is written in this language, such as ``1.234,5`` in German."""
        text = f"{value:,.{digits}f}"
        return self.localized(text)

    def localized(self, text: str) -> str:
        """Returns text of numbers and units in English with the signs of this language."""
        return text.translate(_GERMAN_SEPARATORS) if self.language == "de" else text

    def has(self, key: str) -> bool:
        """Returns whether there is a text of that name."""
        return key in self._texts

    def url(self, page: str = "", **query: str) -> str:
        """Returns the address of a page in this language, relative to every page."""
        path = route(page, self.language)
        return f"./{path}" + (f"?{urlencode(query)}" if query else "")


def route(page: str, language: str) -> str:
    """Returns the path of a page; Gradio's routes hold no slash."""
    return page if language == DEFAULT else "-".join(filter(None, (language, page)))

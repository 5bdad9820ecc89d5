"""Detected file format of the data, and its manual override."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from gradio_app.pages.components import field
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.content import MISSING, value_at, with_value
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.form import parse_value
from gradio_app.recipe.preview import DataReport
from gradio_app.redaction import short_name
from gradio_app.texts import Texts

_DATA = "data.init_args."
OPTIONS = ("encoding", "delimiter", "sheet")
_ENCODINGS = {
    **{"utf-8": "UTF-8", "cp1252": "Windows-1252", "cp1250": "Windows-1250", "utf-16": "UTF-16"},
    **{"cp1251": "Windows-1251", "iso8859_15": "ISO-8859-15", "mac_roman": "Mac Roman"},
    **{"shift_jis": "Shift JIS", "gb18030": "GB 18030"},
}
# By the name of its text: as it is given, and as it stands in a file.
_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "tab", "pipe": "|"}
_DELIMITER_CHARACTERS = {**_DELIMITERS, "tab": "\t"}
# Of more files, the first ones are named.
_MAX_NAMED_FILES = 5


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    choices = {
        "encoding": [(title, name) for name, title in _ENCODINGS.items()],
        "delimiter": [(t(f"new.delimiter_{key}"), value) for key, value in _DELIMITERS.items()],
        "sheet": [],
    }
    with (
        gr.Accordion(t("new.reading"), open=False, elem_id="reading"),
        gr.Row(elem_classes="settings"),
    ):
        parts = [
            field(
                gr.Dropdown,
                t,
                f"fields.{name}",
                f"reading-{name}",
                choices=[(t("new.detected"), ""), *choices[name]],
                value="",
                allow_custom_value=True,
            )
            for name in OPTIONS
        ]
    for name, part in zip(OPTIONS, parts, strict=True):
        editor.bind(part.input, partial(_change, name), [part], own=True)
    editor.show(parts, lambda s: [str(value_at(s.content, _DATA + n, None) or "") for n in OPTIONS])


def _change(name: str, session: Session, given: Any) -> dict[str, Any]:
    value = parse_value(BY_PATH[_DATA + name], given)
    return with_value(session.content, _DATA + name, MISSING if value is None else value)


def unusual_formats(found: DataReport, t: Texts) -> list[str]:
    """Returns how files were read that are not read as usual, a line each."""
    unusual = [one for one in found.numbers.get("read_as", []) if not one.get("usual")]
    return [
        f"{file_title(str(one['file']), found.numbers)}: {_describe(one, t)}"
        for one in unusual[:_MAX_NAMED_FILES]
    ]


def file_title(name: str, numbers: dict[str, Any]) -> str:
    """Returns the name that an upload had, unless another file has the same."""
    names = {str(one["file"]) for one in numbers.get("read_as") or ()} - {name}
    title = short_name(name)
    return name if title in map(short_name, names) else title


def _describe(one: dict[str, Any], t: Texts) -> str:
    parts = [str(one.get("kind") or "")]
    if one.get("encoding"):
        title = _ENCODINGS.get(one["encoding"], one["encoding"])
        guessed = one.get("encoding_by") == "guessed"
        key = "new.read_encoding_guessed" if guessed else "new.read_encoding"
        parts.append(t(key, name=title, example=one.get("example", "")))
    if one.get("delimiter"):
        name = next((k for k, v in _DELIMITER_CHARACTERS.items() if v == one["delimiter"]), None)
        sign = t(f"new.delimiter_{name}") if name else repr(one["delimiter"])
        parts.append(t("new.read_delimiter", sign=sign))
    if one.get("sheet"):
        parts.append(t("new.read_sheet", name=one["sheet"]))
    notes = [str(note) for note in one.get("notes") or ()]
    return "; ".join([", ".join(filter(None, parts)), *notes])

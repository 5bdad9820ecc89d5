"""Jinja templates: macros in ``templates/*.html``, with the page's texts as ``t``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gradio_app.guards import redacted
from gradio_app.runs.formatting import format_bytes
from gradio_app.texts import Texts


def _without_secrets(value: Any) -> Any:
    return value if hasattr(value, "__html__") else redacted(str(value))


@cache
def _environment(language: str) -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_secrets,
    )
    t = made.globals["t"] = Texts(language)
    made.filters["bytes"] = lambda count: format_bytes(count, t)
    return made


def render(name: str, t: Texts, /, **values: Any) -> str:
    """Renders a macro, such as ``"home.card"``; what is not ``Markup`` is escaped and redacted."""
    file, _, macro = name.partition(".")
    module: Any = _environment(t.language).get_template(f"{file}.html").module
    return getattr(module, macro)(**values).strip()


def message(kind: str, text: str, t: Texts, role: str = "status") -> str:
    """Renders a paragraph of a kind that ``assets/*.css`` knows, such as ``"note"``."""
    return render("parts.message", t, kind=kind, text=text, role=role)

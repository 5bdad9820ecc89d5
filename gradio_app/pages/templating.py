"""HTML from ``templates/*.html``, each a file of macros that see the texts as ``t``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gradio_app.guards import redacted
from gradio_app.texts import Texts


def _without_secrets(value: Any) -> Any:
    return value if hasattr(value, "__html__") else redacted(str(value))


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_without_secrets,
)


def render(name: str, t: Texts, /, **values: Any) -> Markup:
    """Renders a macro; whatever is not ``Markup`` is escaped, without secrets.

    Args:
        name: File and macro, such as ``"home.card"``.
        t: Texts.
        **values: Arguments of the macro.
    """
    file, _, macro = name.partition(".")
    module = _ENVIRONMENT.get_template(f"{file}.html").make_module({"t": t})
    return Markup(getattr(module, macro)(**values).strip())

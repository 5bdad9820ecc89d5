"""The page ``help``: terms, fixes, the keyboard, and what happens with data."""

from __future__ import annotations

import gradio as gr

from gradio_app.guards import escaped
from gradio_app.pages.layout import heading
from gradio_app.studio import Studio
from gradio_app.texts import Texts

TERMS = (
    "adapter",
    "lora",
    "qlora",
    "rank",
    "learning_rate",
    "loss",
    "step",
    "epoch",
    "checkpoint",
    "template",
)
# The first three are the kinds of alerts of a run, whose page links here.
PROBLEMS = ("nan", "diverging", "overfitting", "memory", "stuck", "crashed")


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("help.heading"), t("help.below"))
    parts = [
        _section(t("help.how"), _paragraphs(t, "how_1", "how_2", "how_3")),
        _section(t("help.words"), _definitions(t, "word", "about", TERMS)),
        _section(t("help.wrong"), _definitions(t, "wrong", "do", PROBLEMS)),
        _section(t("help.keys"), _paragraphs(t, "keys_text")),
        _section(t("help.data"), f"<p>{escaped(_about_data(studio, t))}</p>", "data_secrets", t),
    ]
    gr.HTML("".join(parts), elem_id="help", padding=False)


def _section(title: str, body: str, last: str = "", t: Texts | None = None) -> str:
    more = _paragraphs(t, last) if t else ""
    return f"<section><h2>{escaped(title)}</h2>{body}{more}</section>"


def _paragraphs(t: Texts, *keys: str) -> str:
    return "".join(f"<p>{escaped(t(f'help.{key}'))}</p>" for key in keys)


def _definitions(t: Texts, term: str, text: str, names: tuple[str, ...]) -> str:
    rows = "".join(
        f'<dt id="{name}">{escaped(t(f"help.{term}_{name}"))}</dt>'
        f"<dd>{escaped(t(f'help.{text}_{name}'))}</dd>"
        for name in names
    )
    return f"<dl>{rows}</dl>"


def _about_data(studio: Studio, t: Texts) -> str:
    if not studio.settings.space:
        return t("help.data_local")
    limits = studio.settings.limits
    return t(
        "help.data_space",
        hours=t.localized(f"{limits.keep_hours:g}"),
        rows=t.number(limits.rows or 0),
        steps=limits.steps,
        minutes=f"{limits.minutes:g}",
    )

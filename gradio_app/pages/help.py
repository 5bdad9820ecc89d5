"""Help page: glossary, fixes, keyboard shortcuts, and data handling."""

from __future__ import annotations

from gradio_app.pages.components import html
from gradio_app.pages.layout import heading
from gradio_app.pages.templating import render
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
    heading(t("help.heading"), t)
    about_data = _about_data(studio, t)
    html(
        render("frame.help", t, terms=TERMS, problems=PROBLEMS, about_data=about_data),
        elem_id="help",
    )


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

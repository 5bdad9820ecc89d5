"""HTML of our own on a page, without the looks that Gradio gives to links and tables in it."""

from __future__ import annotations

from typing import Any

import gradio as gr


def markup(value: str = "", **options: Any) -> gr.HTML:
    """Shows HTML whose looks are those of ``assets/*.css``.

    Args:
        value: The HTML; whatever a visitor or a run has written in it is escaped.
        **options: Arguments of ``gr.HTML``.
    """
    return gr.HTML(value, padding=False, apply_default_css=False, **options)


def render_code_spans(text: str) -> str:
    """Returns a text of ours with what stands between backticks as code."""
    parts = text.split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))

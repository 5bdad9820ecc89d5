"""Buttons in lists of our own HTML, and the question before what cannot be undone."""

from __future__ import annotations

from gradio_app.guards import escaped
from gradio_app.texts import Texts


def confirmation(name: str, text: str, yes: str, t: Texts) -> str:
    """Returns a question with a button, hidden until :func:`confirm_button` is clicked.

    Args:
        name: Which one it is, within its list.
        text: The question.
        yes: The button that does it, as HTML.
        t: Texts.
    """
    return (
        f'<div class="sure" data-question="{escaped(name)}" hidden><p role="alert">'
        f'{escaped(text)}</p>{yes}<button type="button" class="as-button" data-closes>'
        f"{t('run.no')}</button></div>"
    )


def confirm_button(name: str, label: str, spoken: str = "") -> str:
    """Returns the button that asks the question of that name."""
    said = f' aria-label="{escaped(spoken)}"' if spoken else ""
    return (
        f'<button type="button" class="as-button" data-opens="{escaped(name)}"{said}>'
        f"{escaped(label)}</button>"
    )

"""Gradio components and events with the options shared by all pages."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import gradio as gr

from gradio_app.pages.error_reporting import report_errors
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import root_block

# A value of a component, and what changes with it; of a text, that is the text.
Update: TypeAlias = str | tuple[Any, Hashable]


def html(value: str = "", **options: Any) -> gr.HTML:
    """Shows HTML with the looks that Gradio gives to links and tables."""
    return gr.HTML(value, padding=False, **options)


def markup(value: str = "", **options: Any) -> gr.HTML:
    """Shows HTML whose looks are those of ``assets/*.css``."""
    return html(value, apply_default_css=False, **options)


def field(
    kind: Any,
    t: Texts,
    key: str,
    name: str | None = None,
    of: tuple[str, Iterable[Any]] = ("", ()),
    **options: Any,
) -> Any:
    """Shows an input that a visitor can change.

    Args:
        kind: Class of the component.
        t: The texts.
        key: Of the label; the text ``{key}_hint`` is its help, if there is one.
        name: Its id on the page.
        of: Values to choose from, and how the keys of their labels begin.
        **options: Arguments of the component.
    """
    prefix, values = of
    if prefix:
        options["choices"] = [(t(f"{prefix}{value}"), value) for value in values]
    if "info" not in options and t.has(f"{key}_hint"):
        options["info"] = t(f"{key}_hint")
    return kind(label=t(key), elem_id=name, **{"interactive": True, **options})


def on_load(handler: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Calls a handler when the page that is being built is opened, and returns that event.

    ``gr.on`` without triggers would call it after each change of its inputs too.
    """
    return root_block().load(handler, inputs, outputs, **timer_options())


def timer_options() -> dict[str, Any]:
    """Returns the options of an event that a timer sets off.

    Outside the queue it is one request instead of two, and no visitor waits for another.
    """
    return {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def on_event(
    t: Texts,
    events: Callable[..., Any] | Sequence[Callable[..., Any]],
    handler: Callable[..., Any],
    inputs: Any,
    outputs: Any,
    **options: Any,
) -> Any:
    """Calls a handler after events such as ``button.click``, and returns the last event.

    Its errors are shown to the visitor, and it is not part of the API.
    """
    bound, called = None, report_errors(t)(handler)
    for event in events if isinstance(events, Sequence) else (events,):
        bound = event(called, inputs, outputs, api_visibility="private", **options)
    return bound


def changed_updates(items: Sequence[Update], seen: object) -> tuple[Any, list[Any]]:
    """Returns the updates to send to a browser: answers to a clock hold only what has changed.

    The browser keeps what it was sent last, in a component that nobody sees: so this is what it
    shows, also where the answers to a click and to the clock have overtaken each other.

    Args:
        items: Values of components.
        seen: What the browser keeps; anything else, such as nothing, requests everything.

    Returns:
        What it is to keep, and the values; where nothing has changed, ``gr.skip()``.
    """
    pairs = [(item, item) if isinstance(item, str) else item for item in items]
    keys = [format(hash(key) & 0xFFFFFFFF, "x") for _, key in pairs]
    before = str(seen).split()
    if len(before) != len(keys):
        before = [""] * len(keys)
    values = [
        gr.skip() if key == old else value
        for (value, _), key, old in zip(pairs, keys, before, strict=True)
    ]
    return gr.skip() if keys == before else " ".join(keys), values

"""What a browser does not show yet: answers to a clock hold only what has changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import gradio as gr


def changed_updates(items: Sequence[tuple[Any, Hashable]], seen: object) -> tuple[Any, list[Any]]:
    """Returns the updates to send to a browser.

    The browser keeps what it was sent last, in a component that nobody sees: so this is what it
    shows, also where the answers to a click and to the clock have overtaken each other.

    Args:
        items: Values of components, each with what changes with it.
        seen: What the browser keeps; anything else, such as nothing, asks for everything.

    Returns:
        What it is to keep, and the values; where nothing has changed, ``gr.skip()``.
    """
    keys = [format(hash(key) & 0xFFFFFFFF, "x") for _, key in items]
    before = str(seen).split()
    if len(before) != len(keys):
        before = [""] * len(keys)
    values = [
        gr.skip() if key == old else value
        for (value, _), key, old in zip(items, keys, before, strict=True)
    ]
    return gr.skip() if keys == before else " ".join(keys), values

"""Visitors of a Space, whom their cookies identify."""

from __future__ import annotations

from gradio_app.visitors import COOKIE, owner_of

HERS, HIS = "a" * 32, "b" * 32


class Request:
    """What of a request identifies its visitor."""

    def __init__(self, cookies: dict[str, str], session: dict | None = None) -> None:
        self.request = self
        self.cookies = cookies
        self.scope = {} if session is None else {"session": session}


def owner_with(cookie: str) -> str:
    """Returns the owner of what the visitor with that cookie starts on a Space."""
    return owner_of(Request({COOKIE: cookie}), space=True)

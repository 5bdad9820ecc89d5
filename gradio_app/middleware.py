"""ASGI middleware: redirects of common addresses, and the ``lang`` attribute of the HTML."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gradio_app.texts import DEFAULT, LANGUAGES, route


class Redirects:
    """Redirects guessed addresses: ``/de/new`` to what Gradio can only serve as ``/de-new``."""

    def __init__(self, app: Any, pages: tuple[str, ...]) -> None:
        self.app = app
        self.targets = {
            f"/{language}/{page}".rstrip("/"): f"/{route(page, language)}"
            for language in LANGUAGES
            for page in pages
            if page or language == DEFAULT
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answers a request, or hands it on."""
        path = str(scope.get("path", "")).rstrip("/")
        target = self.targets.get(path) if scope["type"] == "http" else None
        if target is None:
            await self.app(scope, receive, send)
            return
        query = scope.get("query_string", b"").decode("latin-1")
        place = str(scope.get("root_path", "")).rstrip("/") + target
        location = f"{place}?{query}" if query else place
        redirect = import_module("starlette.responses").RedirectResponse(location)
        await redirect(scope, receive, send)


def language_of(path: str) -> str:
    """Returns the language of the page at a path."""
    code = path.rstrip("/").rpartition("/")[2].partition("-")[0]
    return code if code in LANGUAGES else DEFAULT


def localized(body: bytes, language: str) -> bytes:
    """Returns the HTML of a page, with what says its language before anything else is run.

    Gradio writes its own texts in the language of the browser, whatever that of the page is.
    """
    said = (
        f"<script>for (const [name, value] of [['language', '{language}'], ['languages', "
        f"['{language}']]]) Object.defineProperty(navigator, name, {{ get: () => value }});"
        f"document.documentElement.lang = '{language}';</script>"
    )
    return body.replace(b"<head>", b"<head>" + said.encode(), 1)


class Localized:
    """Puts the language of a page into its HTML, which Gradio takes from the browser."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answers a request; other answers than HTML are handed on as they are."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        language = language_of(str(scope.get("path", "")))
        start: dict[str, Any] | None = None
        parts: list[bytes] = []

        async def changed(message: dict[str, Any]) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                kinds = [value for name, value in message["headers"] if name == b"content-type"]
                if any(kind.startswith(b"text/html") for kind in kinds):
                    start = message
                    return
            if start is None or message["type"] != "http.response.body":
                await send(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = localized(b"".join(parts), language)
            kept = [one for one in start["headers"] if one[0] != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            await send({**start, "headers": [*kept, length]})
            await send({**message, "body": body})

        await self.app(scope, receive, changed)

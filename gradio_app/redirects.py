"""Addresses that people guess: ``/de/new`` for what Gradio can only serve as ``/de-new``."""

from __future__ import annotations

from typing import Any

from gradio_app.texts import DEFAULT, LANGUAGES, route


class Redirects:
    """ASGI middleware that sends guessed addresses of pages to their own."""

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
        query = scope.get("query_string", b"")
        place = str(scope.get("root_path", "")).rstrip("/") + target
        location = place.encode() + (b"?" + query if query else b"")
        headers = [(b"location", location), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 307, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

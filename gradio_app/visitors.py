"""Identity of visitors: one owner on a laptop, separate visitors on a Space.

A Space identifies visitors by a random cookie that only this server can read, or by the name
they signed in with. What an owner may see is decided in ``runs.store``, run by run.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from typing import Any

# The owner of a machine and of the runs of its command line, and the name of the local executor.
LOCAL = "local"
COOKIE = "studio_visitor"
_VALUE = re.compile(r"[0-9a-f]{32}")


def owner_of(request: Any, space: bool) -> str:
    """Returns who owns what this request, a ``gr.Request``, starts.

    ``"local"``, ``"hf-NAME"`` of somebody signed in, or ``"v-..."``: a hash, so that the files of a
    run do not hold what would let others act as its owner.
    """
    if not space:
        return LOCAL
    name = username_of(request)
    if name:
        return f"hf-{name}"
    value = _cookie(request)
    return "v-" + hashlib.sha256(value.encode()).hexdigest()[:20]


def username_of(request: Any) -> str | None:
    """Returns the name on the hub of who is asking, as the hub's sign-in left it."""
    name = _sign_in(request).get("userinfo", {}).get("preferred_username")
    return name if isinstance(name, str) and name else None


def token_of(request: Any) -> str | None:
    """Returns the token that the hub gave for who is asking; it is kept nowhere."""
    found = _sign_in(request)
    token = found.get("access_token")
    valid = isinstance(token, str) and float(found.get("expires_at") or 0) > time.time()
    return token if valid else None


def _sign_in(request: Any) -> dict[str, Any]:
    inner = getattr(request, "request", None)
    scope = getattr(inner, "scope", None)
    # Starlette refuses to read a session where nothing keeps one.
    session = scope.get("session") if isinstance(scope, dict) else None
    found = session.get("oauth_info") if session else None
    return found if isinstance(found, dict) else {}


def _cookie(request: Any) -> str:
    inner = getattr(request, "request", None)
    given = dict(inner.cookies).get(COOKIE, "") if inner is not None else ""
    # Without a cookie, a request is a stranger of its own and sees nothing of anyone.
    return given if _VALUE.fullmatch(given) else secrets.token_hex(16)


class VisitorCookie:
    """ASGI middleware that gives every new visitor a cookie with the first page.

    The Space stands in a frame of another site, so the cookie must be allowed there
    (``SameSite=None``) and must not follow the visitor elsewhere (``Partitioned``).
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Passes the request on, and adds the cookie to the answer of those who bring none."""
        if not _wants_page(scope) or _brings_cookie(scope):
            await self._app(scope, receive, send)
            return
        value = secrets.token_hex(16)
        text = f"{COOKIE}={value}; Path=/; HttpOnly; Secure; SameSite=None; Partitioned"

        async def send_with_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((b"set-cookie", text.encode()))
            await send(message)

        await self._app(scope, receive, send_with_cookie)


def _wants_page(scope: dict[str, Any]) -> bool:
    return scope["type"] == "http" and any(
        name == b"accept" and b"text/html" in value for name, value in scope["headers"]
    )


def _brings_cookie(scope: dict[str, Any]) -> bool:
    pattern = re.compile(rf"(?:^|;\s*){COOKIE}=[0-9a-f]{{32}}(?:;|$)".encode())
    return any(name == b"cookie" and pattern.search(value) for name, value in scope["headers"])

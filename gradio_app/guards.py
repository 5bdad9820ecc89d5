"""Validation of visitors' input: ids, paths, names and displayed text.

Every handler of a page is a public HTTP endpoint, whatever its page shows: Gradio's ``private``
only leaves it out of a list. So nothing that arrives is trusted for having been offered.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from gradio_app.errors import UserError

_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Tokens of the hub, of W&B, of cloud stores, and whatever stands behind a word for a secret.
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|AKIA[0-9A-Z]{16}"
    # Not the end of "task-"; in JSON a line end before it is the letter n.
    r"|(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))sk-[A-Za-z0-9_-]{16,}"
    r"|(?<=[Bb]earer )[\w.~+/-]{8,}"
    r"|(?i:(?<=token=)|(?<=password=)|(?<=api_key=)|(?<=secret=))[^\s&\"']+"
)


def checked_run_id(text: object) -> str:
    """Returns ``text`` if it can be the id of a run. Raises UserError if it cannot."""
    if not isinstance(text, str) or not _RUN_ID.fullmatch(text):
        raise UserError("errors.no_such_run", run=shortened(text))
    return text


def inside(root: Path, path: str | Path) -> Path:
    """Returns ``path`` below ``root``, with all links followed; refuses what leads out."""
    if "\0" in str(path):
        raise UserError("errors.outside", path=shortened(path))
    found = real_path(root / path)
    if found is None or not found.is_relative_to(root.resolve()):
        raise UserError("errors.outside", path=shortened(path))
    return found


def real_path(path: Path) -> Path | None:
    """Returns a path with all links followed; ``None`` where they lead in a circle."""
    try:
        # Twice: links behind a circle that ".." leaves again are not followed the first time.
        return path.resolve().resolve()
    except (OSError, RuntimeError):
        return None


def checked_hub_name(text: object) -> str:
    """Returns ``text`` if it can be the name of a repository on the hub, ``namespace/name``."""
    name = text.strip() if isinstance(text, str) else ""
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise UserError("errors.hub_name", name=shortened(text))
    return name


def checked_revision(text: object, commit: bool = False) -> str | None:
    """Returns ``text`` if it can be a branch, tag or commit; ``None`` for none.

    With ``commit`` it must be the 40 characters of a commit, which cannot be moved.
    """
    name = text.strip() if isinstance(text, str) else ""
    if not name and not commit:
        return None
    if not (_COMMIT if commit else _REVISION).fullmatch(name) or ".." in name:
        raise UserError("errors.commit" if commit else "errors.revision", name=shortened(text))
    return name


def redacted(text: str) -> str:
    """Returns ``text`` without what looks like a token or a password."""
    return _SECRETS.sub("[hidden]", text)


def escaped(text: object) -> str:
    """Returns ``text`` as it can be put into HTML, without secrets."""
    return html.escape(redacted(str(text)), quote=True)


def shortened(text: object, most: int = 60) -> str:
    """Returns ``text`` for an error message: one line, no secrets, not long."""
    line = " ".join(redacted(str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"

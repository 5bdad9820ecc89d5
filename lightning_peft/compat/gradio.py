"""Private parts of Gradio.

- ``Context.root_block``, the Blocks being built: waits for a public accessor.
- ``Blocks.pages`` and ``current_page``: wait for a ``Blocks.route`` that does not rebuild the app.
- ``utils.get_upload_folder``, whose files Gradio serves: waits for a public name.
- ``EventData._data``: waits for public access to the payload of an event.
- ``StateHolder`` and ``SessionState``: wait for sessions without a copy of the page's config.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from gradio.state_holder import SessionState, StateHolder
from gradio.utils import get_upload_folder

# How long a session is kept after its page was closed, and how many sessions there are at most.
CLOSED_SESSION_AGE = datetime.timedelta(minutes=10)
MAX_SESSIONS = 1_000


def root_block() -> gr.Blocks:
    """Returns the Blocks that are being built."""
    root = Context.root_block
    assert root is not None
    return root


def add_page(demo: gr.Blocks, path: str) -> None:
    """Adds a page to the Blocks being built; the components that follow belong to it.

    ``Blocks.route`` must be called outside of the Blocks, and each time they are left Gradio builds
    its whole server again. Its navigation bar would list every language.
    """
    demo.pages.append((path, path, False))
    demo.current_page = path


def served_folder() -> Path:
    """Returns the folder of the files that Gradio serves."""
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def event_data(event: gr.EventData) -> dict[str, Any]:
    """Returns the payload of an event; an empty one if it is not an object."""
    data = getattr(event, "_data", None)
    return data if isinstance(data, dict) else {}


class CompactSessions(StateHolder):
    """Sessions without a config of every component, kept while their pages are open.

    Gradio keeps one for each session, megabytes of it, for deep links, which these pages do not
    have; what changes in a session is described again then. And it keeps ten thousand sessions,
    closed or not. A page whose session is gone reloads itself when its machine wakes.
    """

    def set_blocks(self, blocks: gr.Blocks) -> None:
        """Sets the Blocks of the sessions."""
        super().set_blocks(blocks)
        self.capacity = MAX_SESSIONS

    def __getitem__(self, session_id: str) -> SessionState:
        known = session_id in self.session_data
        session = super().__getitem__(session_id)
        if not known:
            session.config_values.clear()
        return session

    def delete_all_expired_state(self) -> None:
        """Deletes sessions whose pages were closed a while ago; called by Gradio every second."""
        super().delete_all_expired_state()
        now = datetime.datetime.now()
        for session_id, session in list(self.session_data.items()):
            if (
                session.is_closed
                and now - self.time_last_used.get(session_id, now) > CLOSED_SESSION_AGE
            ):
                self.session_data.pop(session_id, None)
                self.time_last_used.pop(session_id, None)


def use_compact_sessions(demo: gr.Blocks) -> None:
    """Replaces the sessions of a server that was just started; those that exist are kept."""
    before, sessions = demo.app.state_holder, CompactSessions()
    sessions.session_data, sessions.time_last_used = before.session_data, before.time_last_used
    sessions.lock = before.lock
    sessions.set_blocks(demo)
    demo.app.state_holder = sessions

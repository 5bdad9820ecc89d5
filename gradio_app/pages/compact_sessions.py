"""What the server remembers of every page that was opened, kept small."""

from __future__ import annotations

import datetime

import gradio as gr
from gradio.state_holder import SessionState, StateHolder

# What is not asked for any longer after its page was closed is forgotten. A page that lives on, as
# its machine slept, shows this where it matters, and loads itself again when the machine wakes.
CLOSED_SESSION_AGE = datetime.timedelta(minutes=10)
# Callers that say nothing when they leave are forgotten when so many others have come.
MAX_SESSIONS = 1_000


class CompactSessions(StateHolder):
    """Sessions without a description of every component of every page, while their pages live.

    Gradio keeps one for each session, megabytes of it, so that a link to a page with its values can
    be made (deep links, which these pages do not have). What changes in a session is described anew
    then. And it keeps ten thousand sessions, closed or not.
    """

    def set_blocks(self, blocks: gr.Blocks) -> None:
        """Takes the pages that the sessions are of."""
        super().set_blocks(blocks)
        self.capacity = MAX_SESSIONS

    def __getitem__(self, session_id: str) -> SessionState:
        known = session_id in self.session_data
        found = super().__getitem__(session_id)
        if not known:
            found.config_values.clear()
        return found

    def delete_all_expired_state(self) -> None:
        """Forgets sessions whose pages were closed a while ago; Gradio calls it every second."""
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
    """Makes the sessions of a server that was just started lean ones."""
    before, states = demo.app.state_holder, CompactSessions()
    # Whoever came first keeps what they have.
    states.session_data, states.time_last_used = before.session_data, before.time_last_used
    states.lock = before.lock
    states.set_blocks(demo)
    demo.app.state_holder = states

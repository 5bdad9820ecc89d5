"""What the server remembers of every page that was opened, kept small."""

from __future__ import annotations

import gradio as gr
from gradio.state_holder import SessionState, StateHolder


class LeanStates(StateHolder):
    """Sessions without a description of every component of every page.

    Gradio keeps one for each session, megabytes of it, so that a link to a page with its values can
    be made (deep links, which these pages do not have), and keeps sessions long after their pages
    were closed. What changes in a session is described anew then.
    """

    def __getitem__(self, session_id: str) -> SessionState:
        known = session_id in self.session_data
        found = super().__getitem__(session_id)
        if not known:
            found.config_values.clear()
        return found


def keep_lean(demo: gr.Blocks) -> None:
    """Makes the sessions of a server that was just started lean ones."""
    before, states = demo.app.state_holder, LeanStates()
    # Whoever came first keeps what they have.
    states.session_data, states.time_last_used = before.session_data, before.time_last_used
    states.lock = before.lock
    states.set_blocks(demo)
    demo.app.state_holder = states

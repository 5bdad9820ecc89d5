"""The parts that all pages of a server share."""

from __future__ import annotations

from gradio_app.exporting.exports import Exports
from gradio_app.recipe.warm import WarmCommands
from gradio_app.running.line import Line
from gradio_app.running.store import RunStore
from gradio_app.settings import Settings
from gradio_app.speaking.speakers import Speakers


class Studio:
    """The parts that all pages of a server share; nothing here knows of Gradio.

    Args:
        settings: What the server was started with.

    Attributes:
        settings: The same.
        store: All runs.
        line: The runs that wait, and the one that is carried out.
        speakers: The model that is talked to, if one is loaded.
        exports: What is taken along of runs.
        warm: A process that answers commands at once, once somebody has asked for one.
        planning: Another one for memory plans, which take long; checks do not wait for them.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for folder in (settings.runs, settings.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        self.store = RunStore(settings)
        self.line = Line(settings, self.store)
        self.speakers = Speakers(settings, self.line.active)
        self.exports = Exports(settings, self.store, self.line.active)
        self.warm = WarmCommands(settings)
        self.planning = WarmCommands(settings)

    def close(self) -> None:
        """Ends what the server has started for itself. Runs go on without it."""
        self.speakers.close()
        self.line.close()
        self.warm.close()
        self.planning.close()

"""The parts that all pages of a server share."""

from __future__ import annotations

from gradio_app.settings import Settings


class Studio:
    """The parts that all pages of a server share; nothing here knows of Gradio.

    Args:
        settings: What the server was started with.

    Attributes:
        settings: The same.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for folder in (settings.runs, settings.uploads):
            folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Ends what the server has started for itself. Runs go on without it."""

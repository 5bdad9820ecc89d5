"""The page ``run``."""

from __future__ import annotations

from gradio_app.pages.frame import heading
from gradio_app.studio import Studio
from gradio_app.texts import Texts


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("run.heading"))

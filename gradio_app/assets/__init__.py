"""Theme of the page: Gradio's default with accessible colours and complete fonts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes.utils import colors, fonts, sizes


def script(name: str) -> str:
    """Returns a script of this folder, such as the function that an event calls in the browser."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


# For `js_on_load` of HTML with buttons: a click triggers an event with what the button is about.
CLICK_DELEGATE = script("clicks.js")


def theme() -> Any:
    """Returns the theme.

    The bold weights are 700, since the files of 600 that Gradio brings lack most letters. Button,
    label and hint colours have a contrast of at least 4.5 to 1 on their grounds, light and dark.
    """
    sans = fonts.LocalFont("IBM Plex Sans", weights=(400, 700))
    mono = fonts.LocalFont("IBM Plex Mono", weights=(400, 700))
    made = gr.themes.Default(
        primary_hue=colors.indigo,
        secondary_hue=colors.indigo,
        neutral_hue=colors.slate,
        radius_size=sizes.radius_md,
        text_size=sizes.text_md,
        font=[sans, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
    )
    return made.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_800",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_label_text_weight="400",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_cancel_background_fill="*red_700",
        button_cancel_background_fill_dark="*red_700",
        button_cancel_background_fill_hover="*red_800",
        button_cancel_text_color="white",
        button_cancel_text_color_dark="white",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        slider_color="*primary_600",
    )


def head(titles: dict[str, str], labels: dict[str, dict[str, str]]) -> str:
    """Returns the ``head`` of each page.

    ``titles`` are those of the pages, by the last part of their path; ``labels`` are translations,
    by language, of what Gradio names in English alone.
    """
    known = json.dumps(titles).replace("<", "\\u003c")
    others = json.dumps(labels).replace("<", "\\u003c")
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<script>window.studioTitles = {known};\nwindow.studioLabels = {others};\n"
        f"{script('page.js')}</script>"
    )

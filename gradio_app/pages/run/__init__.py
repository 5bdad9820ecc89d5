"""Run page: header with the next action, and tabs."""

from __future__ import annotations

import gradio as gr

from gradio_app.pages.layout import on_load
from gradio_app.pages.run.actions import Actions
from gradio_app.pages.run.export_tab import ExportTab
from gradio_app.pages.run.head import Head
from gradio_app.pages.run.live import Live
from gradio_app.pages.run.playground import PlaygroundTab
from gradio_app.pages.run.recipe import RecipeTab
from gradio_app.pages.run.sweep import SweepSection
from gradio_app.pages.run.view import RunView
from gradio_app.studio import Studio
from gradio_app.texts import Texts

TABS: dict[str, type[PlaygroundTab | ExportTab]] = {"try": PlaygroundTab, "export": ExportTab}


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    view = RunView(studio, t)
    view.add(Head(studio, t))
    actions = Actions(studio, t)
    view.add(actions)
    view.add(SweepSection(studio, t))
    with gr.Tabs(elem_id="run-tabs", visible=False, overflow_behavior="wrap") as tabs:
        with gr.Tab(t("run.tab_live"), id="live", elem_id="tab-live"):
            view.add(Live(t))
        for tab, made in TABS.items():
            with gr.Tab(t(f"run.tab_{tab}"), id=tab, elem_id=f"tab-{tab}"):
                made(studio, t, view.run_id).bind()
        with gr.Tab(t("run.tab_recipe"), id="recipe", elem_id="tab-recipe"):
            view.add(RecipeTab(studio, t))
    view.bind(tabs)
    actions.bind(view)
    on_load(view.on_load, None, view.outputs)

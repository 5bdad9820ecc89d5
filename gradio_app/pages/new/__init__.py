"""The page on which a recipe is made: four steps, one recipe, checked before anything starts."""

from __future__ import annotations

import gradio as gr

from gradio_app.pages.components import html
from gradio_app.pages.layout import heading
from gradio_app.pages.new import data, method, model, review, starting_point
from gradio_app.pages.new.editor import Editor
from gradio_app.pages.templating import render
from gradio_app.studio import Studio
from gradio_app.texts import Texts

STEPS = ("model", "data", "method", "review")
# The step that is shown is in the address: links, the back button and reloads work by themselves.
_STEPPING = """
() => {
  const steps = ['model', 'data', 'method', 'review', 'all'];
  const page = document.getElementById('page');
  const show = (focus) => {
    const asked = window.location.hash.slice(1);
    if (asked && !steps.includes(asked)) return;
    const step = asked || 'model';
    page.dataset.step = step;
    document.querySelectorAll('nav.steps a').forEach((link) => {
      if (link.hash.slice(1) === step) link.setAttribute('aria-current', 'step');
      else link.removeAttribute('aria-current');
    });
    if (!focus) return;
    const heading = document.getElementById(`heading-${step === 'all' ? 'model' : step}`);
    heading?.focus({ preventScroll: true });
    document.querySelector('nav.steps')?.scrollIntoView({ block: 'start' });
  };
  // What is clicked before the draft is there would be taken back by it.
  const steps_of_page = [...document.querySelectorAll('.step')];
  const restored = () => document.querySelector('#model-facts .chosen');
  if (!restored()) {
    for (const step of steps_of_page) step.inert = true;
    const free = () => { for (const step of steps_of_page) step.inert = false; };
    const watch = new MutationObserver(() => {
      if (!restored()) return;
      watch.disconnect();
      free();
    });
    watch.observe(page, { childList: true, subtree: true });
    setTimeout(free, 30_000);
  }
  window.addEventListener('hashchange', () => show(true));
  show(false);
}
"""


def build(studio: Studio, t: Texts) -> None:
    """Makes the page."""
    heading(t("new.heading"), t, t("new.below"))
    html(render("new.steps", t, names=STEPS), elem_id="steps")
    editor = Editor(studio, t)
    of = html(elem_id="new-copied")
    editor.show([of], lambda session: [starting_point.copied_from(session, t)])
    makers = {"model": _model, "data": data.build, "method": method.build, "review": review.build}
    for number, (step, make) in enumerate(makers.items(), start=1):
        with gr.Column(elem_id=f"step-{step}", elem_classes="step"):
            html(render("new.step_heading", t, number=number, name=step))
            make(editor)
            if step != STEPS[-1]:
                html(render("new.next_step", t, name=STEPS[number]))
    editor.finish()
    starting_point.bind_page_load(editor)
    gr.on(None, None, None, None, js=_STEPPING)


def _model(editor: Editor) -> None:
    starting_point.build(editor)
    model.build(editor)

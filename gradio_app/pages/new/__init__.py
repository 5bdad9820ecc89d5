"""The page on which a recipe is made: four steps, one recipe, checked before anything starts."""

from __future__ import annotations

import gradio as gr

from gradio_app.guards import escaped
from gradio_app.pages.layout import heading
from gradio_app.pages.new import data, method, model, review, starting_point
from gradio_app.pages.new.editor import Editor
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
    heading(t("new.heading"), t("new.below"))
    gr.HTML(_steps(t), elem_id="steps", padding=False)
    editor = Editor(studio, t)
    of = gr.HTML("", elem_id="new-copied", padding=False)
    editor.show([of], lambda session: [starting_point.copied_from(session, t)])
    makers = {"model": _model, "data": data.build, "method": method.build, "review": review.build}
    for number, (step, make) in enumerate(makers.items(), start=1):
        with gr.Column(elem_id=f"step-{step}", elem_classes="step"):
            gr.HTML(_heading(number, step, t), padding=False)
            make(editor)
            if step != STEPS[-1]:
                gr.HTML(_next(STEPS[number], t), padding=False)
    editor.finish()
    starting_point.bind_page_load(editor)
    gr.on(None, None, None, None, js=_STEPPING)


def _model(editor: Editor) -> None:
    starting_point.build(editor)
    model.build(editor)


def _steps(t: Texts) -> str:
    items = "".join(
        f'<li><a href="#{step}"><span aria-hidden="true">{number}</span> '
        f"{escaped(t(f'new.step_{step}'))}</a></li>"
        for number, step in enumerate(STEPS, start=1)
    )
    return (
        f'<nav class="steps" aria-label="{escaped(t("new.steps"))}"><ol>{items}</ol>'
        f'<a class="all" href="#all">{escaped(t("new.step_all"))}</a></nav>'
    )


def _heading(number: int, step: str, t: Texts) -> str:
    return (
        f'<h2 id="heading-{step}" tabindex="-1">{number}. {escaped(t(f"new.step_{step}"))}</h2>'
        f'<p class="note">{escaped(t(f"new.about_{step}"))}</p>'
    )


def _next(step: str, t: Texts) -> str:
    text = escaped(t("new.next", step=t(f"new.step_{step}")))
    return f'<p class="next"><a class="as-button primary" href="#{step}">{text}</a></p>'

"""Review step of a Space: submit the run as a job of the visitor's account."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, shortened
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.templating import message
from gradio_app.recipe.validation import validate_recipe
from gradio_app.redaction import Redactor
from gradio_app.runs import hf_jobs
from gradio_app.settings import Limits
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import token_of, username_of

MAX_MINUTES = 24 * 60


class JobInputs(NamedTuple):
    """Values of the components of the part, in the order in which they are sent."""

    recipe: Any
    name: Any
    flavor: Any
    minutes: Any
    repository: Any
    agreed: Any


def build(studio: Studio, t: Texts, recipe: Any, name: Any, gone: Any) -> None:
    """Makes the part; on a laptop there is none.

    ``gone`` takes the id of the started run; the page then goes there.
    """
    if not studio.settings.space:
        return
    with gr.Accordion(t("hub_job.heading"), open=False, elem_id="hub-job"):
        html(f"<p>{t('hub_job.below')}</p>")
        show = gr.Button(t("hub_job.show"))
        machine = field(gr.Dropdown, t, "hub_job.machine", choices=[])
        minutes = field(gr.Number, t, "hub_job.minutes", value=60, precision=0)
        repository = field(gr.Textbox, t, "hub_job.repository", elem_classes="warns")
        cost = html()
        agreed = field(gr.Checkbox, t, "hub_job.agree")
        start = gr.Button(t("hub_job.start"), variant="primary", interactive=False)
    on_event(t, show.click, _hardware_handler(t), None, [machine, repository, start])
    on_event(t, (machine.change, minutes.change), _cost_handler(t), [machine, minutes], cost)
    given = [recipe, name, machine, minutes, repository, agreed]
    on_event(t, start.click, _start_handler(studio), given, gone)


def _require_token(request: gr.Request) -> str:
    token = token_of(request)
    if token is None:
        raise UserError("hub_job.sign_in")
    return token


def _hardware_handler(t: Texts) -> Any:
    def show(request: gr.Request) -> tuple[Any, Any, Any]:
        rows = [
            (_hardware_label(t, one), one.flavor)
            for one in hf_jobs.list_hardware(_require_token(request))
        ]
        mine = f"{username_of(request)}/my-adapter"
        return gr.Dropdown(rows), mine, gr.Button(interactive=True)

    return show


def _hardware_label(t: Texts, machine: hf_jobs.Hardware) -> str:
    return t(
        "hub_job.machine_row", title=machine.title, dollars=t.number(machine.dollars_per_hour, 2)
    )


def _cost_handler(t: Texts) -> Any:
    def price(flavor: Any, minutes: Any, request: gr.Request) -> str:
        machine, asked = _find_hardware(flavor, _require_token(request)), _validate_minutes(minutes)
        dollars = t.number(hf_jobs.max_cost(machine, asked), 2)
        text = t("hub_job.cost", dollars=dollars, minutes=f"{asked:g}", title=machine.title)
        return message("", text, t)

    return price


def _find_hardware(flavor: Any, token: str) -> hf_jobs.Hardware:
    for machine in hf_jobs.list_hardware(token):
        if machine.flavor == flavor:
            return machine
    raise UserError("hub_job.no_machine")


def _validate_minutes(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 1 <= value <= MAX_MINUTES:
        raise UserError("hub_job.bad_minutes", minutes=shortened(value))
    return float(value)


def _start_handler(studio: Studio) -> Any:
    def start(request: gr.Request, *values: Any) -> str:
        token, inputs = _require_token(request), JobInputs(*values)
        if inputs.agreed is not True:
            raise UserError("hub_job.not_agreed")
        machine = _find_hardware(inputs.flavor, token)
        asked = _validate_minutes(inputs.minutes)
        repository, recipe = checked_hub_name(inputs.repository), str(inputs.recipe)
        packages = hf_jobs.job_packages()
        owner = studio.owner(request)
        # What the visitor pays for needs no limits of this machine.
        validate_recipe(recipe, replace(studio.settings, limits=Limits()), owner)
        name = studio.store.distinct_name(owner, str(inputs.name))
        run = studio.store.create(owner, recipe, name)
        try:
            hf_jobs.start_job(run.folder, token, machine.flavor, asked, repository, packages)
            studio.store.update_metadata(run, where=hf_jobs.EXECUTOR, launched=run.created)
        except Exception as error:
            studio.store.erase(owner, run.id)
            if isinstance(error, UserError):
                raise
            reason = shortened(Redactor(studio.settings).text(str(error)), 300)
            raise UserError("hub_job.refused", reason=reason) from error
        return str(run.id)

    return start

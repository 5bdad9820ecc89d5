"""The part of a Space's review that hands the run to a job of the visitor's own account."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, escaped, shortened
from gradio_app.pages.error_reporting import report_errors
from gradio_app.pages.layout import event_options
from gradio_app.recipe.validation import validate_recipe
from gradio_app.redaction import Redactor
from gradio_app.runs import hf_jobs
from gradio_app.settings import Limits
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of, token_of, username_of

# What a job installs. It trains with the release that is on the index, not with this page.
PACKAGE = "lightning-peft"
MAX_MINUTES = 24 * 60


@dataclass(frozen=True)
class _Form:
    machine: gr.Dropdown
    minutes: gr.Number
    repository: gr.Textbox
    cost: gr.HTML
    agreed: gr.Checkbox
    start: gr.Button


def build(studio: Studio, t: Texts, recipe: Any, name: Any, gone: Any) -> None:
    """Makes the part; on a laptop there is none.

    Args:
        studio: The shared parts.
        t: The texts.
        recipe: Component that holds the YAML.
        name: Component that holds the name of the run.
        gone: Component that takes the id of the started run; the page then goes there.
    """
    if not studio.settings.space:
        return
    with gr.Accordion(t("hub_job.heading"), open=False, elem_id="hub-job"):
        gr.HTML(f"<p>{escaped(t('hub_job.below'))}</p>", padding=False)
        show = gr.Button(t("hub_job.show"))
        form = _form(t)
    show.click(
        report_errors(t)(_hardware_handler(t)),
        None,
        [form.machine, form.repository, form.start],
        **event_options(),
    )
    for changed in (form.machine.change, form.minutes.change):
        changed(
            report_errors(t)(_cost_handler(t)),
            [form.machine, form.minutes],
            form.cost,
            **event_options(),
        )
    given = [recipe, name, form.machine, form.minutes, form.repository, form.agreed]
    form.start.click(report_errors(t)(_start_handler(studio)), given, gone, **event_options())


def _form(t: Texts) -> _Form:
    return _Form(
        machine=gr.Dropdown([], label=t("hub_job.machine"), interactive=True),
        minutes=gr.Number(60, label=t("hub_job.minutes"), precision=0, interactive=True),
        repository=gr.Textbox(
            label=t("hub_job.repository"), info=t("hub_job.repository_hint"), interactive=True
        ),
        cost=gr.HTML("", padding=False),
        agreed=gr.Checkbox(label=t("hub_job.agree"), interactive=True),
        start=gr.Button(t("hub_job.start"), variant="primary", interactive=False),
    )


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
        "hub_job.machine_row",
        title=machine.title,
        dollars=t.number(machine.dollars_per_hour, 2),
    )


def _cost_handler(t: Texts) -> Any:
    def price(flavor: Any, minutes: Any, request: gr.Request) -> str:
        machine, asked = _find_hardware(flavor, _require_token(request)), _validate_minutes(minutes)
        dollars = t.number(hf_jobs.max_cost(machine, asked), 2)
        text = t("hub_job.cost", dollars=dollars, minutes=f"{asked:g}", title=machine.title)
        return f'<p role="status">{escaped(text)}</p>'

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
    def start(
        recipe: Any,
        name: Any,
        flavor: Any,
        minutes: Any,
        repository: Any,
        agreed: Any,
        request: gr.Request,
    ) -> str:
        token = _require_token(request)
        if agreed is not True:
            raise UserError("hub_job.not_agreed")
        machine, asked = _find_hardware(flavor, token), _validate_minutes(minutes)
        repository = checked_hub_name(repository)
        owner = owner_of(request, studio.settings.space)
        # What the visitor pays for needs no limits of this machine.
        validate_recipe(str(recipe), replace(studio.settings, limits=Limits()), owner)
        run = studio.store.create(owner, str(recipe), shortened(name))
        try:
            hf_jobs.start_job(run.folder, token, machine.flavor, asked, repository, PACKAGE)
            studio.store.update_metadata(run, where=hf_jobs.EXECUTOR, launched=run.created)
        except Exception as error:
            studio.store.delete(owner, run.id)
            if isinstance(error, UserError):
                raise
            reason = shortened(Redactor(studio.settings).text(str(error)), 300)
            raise UserError("hub_job.refused", reason=reason) from error
        return str(run.id)

    return start

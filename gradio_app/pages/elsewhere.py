"""The part of a Space's review that hands the run to a job of the visitor's own account."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, escaped, shortened
from gradio_app.pages.frame import private
from gradio_app.pages.handling import told
from gradio_app.recipe.validation import validate_recipe
from gradio_app.redaction import Redactor
from gradio_app.runs import hf_jobs
from gradio_app.settings import Limits
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of, token_of, username_of

# What a job installs. It trains with the release that is on the index, not with this page.
PACKAGE = "lightning-peft"
MOST_MINUTES = 24 * 60


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
    with gr.Accordion(t("elsewhere.heading"), open=False, elem_id="elsewhere"):
        gr.HTML(f"<p>{escaped(t('elsewhere.below'))}</p>", padding=False)
        show = gr.Button(t("elsewhere.show"))
        form = _form(t)
    show.click(told(t)(_shower(t)), None, [form.machine, form.repository, form.start], **private())
    for changed in (form.machine.change, form.minutes.change):
        changed(told(t)(_pricer(t)), [form.machine, form.minutes], form.cost, **private())
    given = [recipe, name, form.machine, form.minutes, form.repository, form.agreed]
    form.start.click(told(t)(_starter(studio)), given, gone, **private())


def _form(t: Texts) -> _Form:
    return _Form(
        machine=gr.Dropdown([], label=t("elsewhere.machine"), interactive=True),
        minutes=gr.Number(60, label=t("elsewhere.minutes"), precision=0, interactive=True),
        repository=gr.Textbox(
            label=t("elsewhere.repository"), info=t("elsewhere.repository_hint"), interactive=True
        ),
        cost=gr.HTML("", padding=False),
        agreed=gr.Checkbox(label=t("elsewhere.agree"), interactive=True),
        start=gr.Button(t("elsewhere.start"), variant="primary", interactive=False),
    )


def _token(request: gr.Request) -> str:
    token = token_of(request)
    if token is None:
        raise UserError("elsewhere.sign_in")
    return token


def _shower(t: Texts) -> Any:
    def show(request: gr.Request) -> tuple[Any, Any, Any]:
        rows = [(_row(t, one), one.flavor) for one in hf_jobs.list_hardware(_token(request))]
        mine = f"{username_of(request)}/my-adapter"
        return gr.Dropdown(rows), mine, gr.Button(interactive=True)

    return show


def _row(t: Texts, machine: hf_jobs.Hardware) -> str:
    return t(
        "elsewhere.machine_row",
        title=machine.title,
        dollars=f"{machine.dollars_per_hour:.2f}",
    )


def _pricer(t: Texts) -> Any:
    def price(flavor: Any, minutes: Any, request: gr.Request) -> str:
        machine, asked = _chosen(flavor, _token(request)), _minutes(minutes)
        dollars = f"{hf_jobs.max_cost(machine, asked):.2f}"
        text = t("elsewhere.cost", dollars=dollars, minutes=f"{asked:g}", title=machine.title)
        return f'<p role="status">{escaped(text)}</p>'

    return price


def _chosen(flavor: Any, token: str) -> hf_jobs.Hardware:
    for machine in hf_jobs.list_hardware(token):
        if machine.flavor == flavor:
            return machine
    raise UserError("elsewhere.no_machine")


def _minutes(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 1 <= value <= MOST_MINUTES:
        raise UserError("elsewhere.bad_minutes", minutes=shortened(value))
    return float(value)


def _starter(studio: Studio) -> Any:
    def start(
        recipe: Any,
        name: Any,
        flavor: Any,
        minutes: Any,
        repository: Any,
        agreed: Any,
        request: gr.Request,
    ) -> str:
        token = _token(request)
        if agreed is not True:
            raise UserError("elsewhere.not_agreed")
        machine, asked = _chosen(flavor, token), _minutes(minutes)
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
            raise UserError("elsewhere.refused", reason=reason) from error
        return str(run.id)

    return start

"""The memory bar: what a run needs, what the machine has, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.guards import escaped
from gradio_app.pages.error_reporting import localized_message, report_errors
from gradio_app.pages.layout import event_options
from gradio_app.pages.new.data_check import unavailable_model
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.planner import Fix, Plan, find_fixes, plan_memory, validate_device, with_fix
from gradio_app.recipe.presets import GPUS, THIS_MACHINE
from gradio_app.recipe.validation import validate_content
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data

# The planner's parts, as few as a person wants to tell apart.
PARTS = {
    "weights": ("weights_quantized", "weights_dense", "dequantization"),
    "adapter": ("adapters", "gradients", "optimizer"),
    "activations": ("activations", "logits"),
    "overhead": ("overhead", "kernels", "heap"),
}


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    device = gr.Dropdown(
        [(t("new.this_machine"), THIS_MACHINE), *((name, name) for name in GPUS)],
        value=THIS_MACHINE,
        label=t("new.device"),
        info=t("new.device_hint"),
        allow_custom_value=True,
        interactive=True,
        elem_id="memory-device",
    )
    bar = gr.HTML("", elem_id="memory", padding=False, js_on_load=CLICK_DELEGATE)

    def plan(session: Any, name: Any, request: gr.Request) -> Iterator[Any]:
        session = editor.of(session, request)
        # Changes that would fit are looked for one by one; meanwhile one may have been made.
        made = partial(_plan_updates, editor, session, name)
        yield from session.while_current("memory", made, gr.skip())

    editor.after_change(plan, [device], [bar])
    device.input(
        report_errors(t)(plan),
        [editor.session, device],
        bar,
        trigger_mode="always_last",
        **event_options(),
    )

    def fix(session: Session, event: gr.EventData) -> dict[str, Any]:
        longest = session.report.longest if session.report else None
        return with_fix(session.content, event_data(event).get("fix"), longest)

    editor.bind_event(bar.click, fix)


def _plan_updates(
    editor: Editor, session: Session, device: Any, still_needed: Callable[[], bool]
) -> Iterator[str]:
    t = editor.t
    longest = session.report.longest if session.report else None
    yield f'<p class="busy" role="status">{escaped(t("new.calculating"))}</p>'
    missing = unavailable_model(session.content)
    if missing:
        message = t("new.model_away", name=missing)
        yield f'<p class="careful" role="status">{escaped(message)}</p>'
        return
    try:
        name = validate_device(device)
        # Data is looked at elsewhere; that it is missing changes nothing here.
        content = {**session.content, "data": {**session.content["data"]}}
        arguments = dict(content["data"].get("init_args") or {})
        arguments["data"] = base_recipe("sft")["data"]["init_args"]["data"]
        content["data"]["init_args"] = arguments
        content = validate_content(content, editor.studio.settings, session.owner)
    except UserError as refused:
        yield f'<p class="careful" role="status">{escaped(localized_message(refused, t))}</p>'
        return
    ask = partial(
        session.plans.ask, worker=editor.studio.planning_worker, still_needed=still_needed
    )
    plan = plan_memory(content, name, ask, longest)
    if plan.fits is not False:
        yield plan_html(plan, t)
        return
    found: list[Fix] = []
    yield plan_html(plan, t, found, more=True)
    for fix in find_fixes(content, name, ask, longest):
        found.append(fix)
        yield plan_html(plan, t, found, more=True)
    yield plan_html(plan, t, found)


def format_gigabytes(size: float) -> str:
    """Returns bytes as makers of devices count."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"


def plan_html(plan: Plan, t: Texts, found: list[Fix] | None = None, more: bool = False) -> str:
    """Returns the bar with its words, and the changes that were found."""
    if plan.refusal:
        reason = f"<pre>{escaped(plan.reason)}</pre>" if plan.reason else ""
        return f'<p class="careful" role="status">{escaped(t(f"new.{plan.refusal}"))}</p>{reason}'
    has = plan.available_bytes or plan.required_bytes
    full = max(has, plan.required_bytes)
    pieces, words = "", []
    for part, names in PARTS.items():
        size = sum(plan.numbers["breakdown"].get(name, 0) for name in names)
        width = 100 * size / full
        pieces += f'<span class="{part}" style="width:{width:.2f}%"></span>'
        label = escaped(t(f"new.part_{part}"))
        amount = t.localized(format_gigabytes(size))
        words.append(f'<li><span class="dot {part}"></span>{label} {amount}</li>')
    low, high = plan.numbers["low_bytes"], plan.numbers["high_bytes"]
    device = plan.numbers.get("device") or {}
    state = {True: "fine", False: "bad"}.get(bool(plan.fits), "careful")
    maybe = plan.fits is False and low <= has
    verdict = t("new.fits") if plan.fits else t("new.may_not_fit" if maybe else "new.fits_not")
    state = "careful" if maybe else state
    name = device.get("name", "")
    if name == "this machine's memory":
        name = t("new.main_memory")
    # Both ends come out the same where the range is narrow.
    one = format_gigabytes(low) == format_gigabytes(high)
    said = t(
        "new.needs_about" if one else "new.needs",
        needs=t.localized(format_gigabytes(plan.required_bytes)),
        low=t.localized(format_gigabytes(low)),
        high=t.localized(format_gigabytes(high)),
        has=t.localized(format_gigabytes(has)),
        name=name,
    )
    line = 100 * has / full
    return (
        f'<div class="memory"><p class="{state}" role="status"><strong>{_icon(state)} '
        f"{escaped(verdict)}</strong> {escaped(said)}</p>"
        f'<div class="pieces" aria-hidden="true">{pieces}<i style="left:{line:.2f}%"></i></div>'
        f'<ul class="parts">{"".join(words)}</ul>'
        f'<p class="note">{escaped(_length_note(plan, t))}</p>{_fixes(plan, t, found, more)}'
        f"{_recommendation(plan, t)}</div>"
    )


def _icon(state: str) -> str:
    return {"fine": "\u2713", "bad": "\u2717"}.get(state, "!")


def _length_note(plan: Plan, t: Texts) -> str:
    run = plan.numbers["run"]
    return t(
        f"new.length_{plan.length_source}", length=t.number(plan.length), batch=run["batch_size"]
    )


def _fixes(plan: Plan, t: Texts, found: list[Fix] | None, more: bool) -> str:
    if found is None:
        return ""
    buttons = ""
    for fix in found:
        fits = t("new.then_fits") if fix.plan.fits else t("new.then_not")
        total = t(
            "new.fix_total", needs=t.localized(format_gigabytes(fix.plan.required_bytes)), fits=fits
        )
        kind = "as-button fits" if fix.plan.fits else "as-button"
        buttons += (
            f'<button type="button" class="{kind}" data-act="fix" data-fix="{fix.name}">'
            f"<span>{escaped(t(f'new.fix_{fix.name}'))}</span> "
            f"<small>{escaped(total)}</small></button>"
        )
    busy = f'<p class="busy">{escaped(t("new.looking_for_fixes"))}</p>' if more else ""
    none = "" if buttons or more else f"<p>{escaped(t('new.no_fixes'))}</p>"
    heading = f"<h4>{escaped(t('new.fixes'))}</h4>"
    return f'{heading}<div class="fixes">{buttons}</div>{busy}{none}'


def _recommendation(plan: Plan, t: Texts) -> str:
    methods = plan.numbers.get("methods", {})
    if not methods:
        return ""
    lora, qlora = (
        t.localized(format_gigabytes(methods[name]["peak_bytes"])) for name in ("lora", "qlora")
    )
    best = plan.numbers.get("recommended_method")
    advice = t(f"new.recommend_{best}" if best in ("lora", "qlora") else "new.recommend_none")
    compared = t("new.compared", lora=lora, qlora=qlora)
    return f'<p class="advice"><strong>{escaped(advice)}</strong> {escaped(compared)}</p>'

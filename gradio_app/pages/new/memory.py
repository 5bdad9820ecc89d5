"""Memory bar: required and available memory, and changes that make the run fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.assets import CLICK_DELEGATE
from gradio_app.errors import UserError
from gradio_app.experiments.estimates import calculated_duration, expected_duration, planned_work
from gradio_app.pages.components import field, html, on_event
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.new.data_check import unavailable_model
from gradio_app.pages.new.editor import Editor, Session
from gradio_app.pages.templating import message, render
from gradio_app.recipe.answer_cache import file_stamps
from gradio_app.recipe.command_worker import CommandResult
from gradio_app.recipe.content import value_at
from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.model_files import cache_disk, free_bytes, is_cached
from gradio_app.recipe.planner import (
    SECONDS,
    Fix,
    Plan,
    find_fixes,
    plan_memory,
    planned_place,
    validate_device,
    with_fix,
)
from gradio_app.recipe.presets import GPUS, MODELS, THIS_MACHINE
from gradio_app.recipe.validation import validate_content
from gradio_app.runs.formatting import format_bytes, format_duration
from gradio_app.runs.machine import this_machine
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.compat.gradio import event_data

# The planner's parts, as few as a person wants to tell apart.
PARTS = {
    "weights": ("weights_quantized", "weights_dense", "dequantization"),
    "adapter": ("adapters", "gradients", "optimizer"),
    "activations": ("activations", "logits"),
    "overhead": ("overhead", "kernels", "heap"),
}
# Bytes on disk for each trained parameter: the best and the last adapter, both also as checkpoints
# with the state of the optimizer.
_DISK_BYTES = 32


def build(editor: Editor) -> None:
    """Makes the part."""
    t = editor.t
    devices = [(t("new.this_machine"), THIS_MACHINE), *((name, name) for name in GPUS)]
    options: dict[str, Any] = {
        "choices": devices,
        "value": THIS_MACHINE,
        "allow_custom_value": True,
    }
    device = field(gr.Dropdown, t, "new.device", "memory-device", **options)
    bar = html(elem_id="memory", js_on_load=CLICK_DELEGATE)

    def plan(session: Any, name: Any, request: gr.Request) -> Iterator[list[Any]]:
        session = editor.of(session, request)
        # Changes that would fit are looked for one by one; meanwhile one may have been made.
        made = partial(_plan_updates, editor, session, name)
        yield from session.while_current("memory", made, [gr.skip(), gr.skip()])

    outputs = [bar, editor.needs]
    editor.after_change(plan, [device], outputs)
    inputs = [editor.session, device]
    on_event(t, device.input, plan, inputs, outputs, trigger_mode="always_last")

    def fix(session: Session, event: gr.EventData) -> dict[str, Any]:
        longest = session.report.longest if session.report else None
        return with_fix(session.content, event_data(event).get("fix"), longest)

    editor.bind_event(bar.click, fix)


def _plan_updates(
    editor: Editor, session: Session, device: Any, still_needed: Callable[[], bool]
) -> Iterator[list[str]]:
    t, unknown = editor.t, needs_html(editor, session)
    longest = session.report.longest if session.report else None
    busy = t("new.calculating")
    yield [message("busy", busy, t), needs_html(editor, session, busy)]
    missing = unavailable_model(session.content)
    if missing and planned_place(missing) == Path(missing):
        yield [message("careful", t("new.model_away", name=missing), t), unknown]
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
        yield [message("careful", localized_message(refused, t), t), unknown]
        return
    studio, state = editor.studio, machine_state(editor.studio, content, name)

    def ask(words: list[str]) -> CommandResult:
        find = partial(studio.planning_worker.run, words, SECONDS)
        keep = partial(keeps_plan, name)
        return studio.answers.ask([words, state], find, keep, still_needed)

    plan = plan_memory(content, name, ask, longest)
    needs = needs_html(editor, session, plan=plan)
    if plan.fits is not False:
        yield [plan_html(plan, t), needs]
        return
    found: list[Fix] = []
    yield [plan_html(plan, t, found, more=True), needs]
    for fix in find_fixes(content, name, ask, longest):
        found.append(fix)
        yield [plan_html(plan, t, found, more=True), needs]
    yield [plan_html(plan, t, found), needs]


def machine_state(studio: Studio, content: dict[str, Any], device: str) -> list[object]:
    """Returns the files of the model and, for this machine, what uses its memory."""
    model = value_at(content, "model.init_args.model", None)
    state: list[object] = [file_stamps(planned_place(str(model)))] if model else []
    if device == THIS_MACHINE:
        run = studio.queue.active()
        state += [run and run.id, studio.chat.process_id]
    return state


def keeps_plan(device: str, found: CommandResult) -> bool:
    """Whether a plan is kept; free memory changes, so one that does not fit here is not."""
    return found.code == 0 and (
        device != THIS_MACHINE or (found.json() or {}).get("fits") is not False
    )


def needs_html(editor: Editor, session: Session, waits: str = "", plan: Plan | None = None) -> str:
    """Returns time, memory and disk that a run needs, each of what there is, as far as known."""
    t, unknown = editor.t, waits or editor.t("new.not_known")
    numbers = plan.numbers if plan is not None else {}
    memory = disk = unknown
    if plan is not None and numbers:
        has = plan.available_bytes or plan.required_bytes
        memory = _share(plan.required_bytes, has, t)
        saved = _DISK_BYTES * numbers["trainable_parameters"]
        disk = _disk(saved, fetched_bytes(session.content), editor.studio.settings.runs, t) or disk
    spent = _duration(editor, session, numbers) or (unknown, "")
    cards = [(t("new.strip_time"), *spent), (t("new.memory"), memory, "")]
    cards.append((t("new.strip_disk"), disk, ""))
    return render("parts.numbers", t, cards=cards, label="", kind="numbers")


def _duration(editor: Editor, session: Session, plan: dict[str, Any]) -> tuple[str, str] | None:
    """Returns how long a run takes here, and by what: earlier runs, else the processor's speed."""
    t, studio, content = editor.t, editor.studio, session.content
    work = planned_work(content, session.report.numbers) if session.report else None
    if work is None:
        return None
    runs = studio.store.list(session.owner)
    runs = [one for one in runs if studio.store.executor(one).uses_this_machine]
    found = expected_duration(content, work, runs, studio.summaries)
    if found is None and plan and not (studio.settings.zero_gpu or this_machine().gpu):
        found = calculated_duration(content, work, plan)
    if found is None:
        return None
    low, high = (format_duration(one, t) for one in (found.low, found.high))
    between = t("new.strip_between", low=low, high=high) if low != high else low
    by = t("new.strip_by", count=found.runs) if found.runs else t("new.strip_calculated")
    return between, by


def _share(needs: int, has: int, t: Texts) -> str:
    return t("new.strip_of", needs=format_bytes(needs, t), has=format_bytes(has, t))


def _disk(saved: int, fetched: int | None, runs: Path, t: Texts) -> str:
    """Returns a run's share of the free disk; of two disks, of the one that it fills more."""
    if fetched is None:
        return ""
    parts = [(saved, shutil.disk_usage(runs).free)]
    if fetched and runs.stat().st_dev == cache_disk().stat().st_dev:
        parts = [(saved + fetched, parts[0][1])]
    elif fetched:
        parts.append((fetched, free_bytes()))
    return _share(*max(parts, key=lambda part: part[0] / max(1, part[1])), t)


def fetched_bytes(content: dict[str, Any]) -> int | None:
    """Returns the bytes of a recipe's model that are fetched first; ``None`` if not known."""
    name = str(value_at(content, "model.init_args.model", None) or "")
    repository, colon, _ = name.partition(":")
    # What comes with a package has a mark such as `package:`.
    here = not name or Path(name).is_absolute() or colon and "/" not in repository
    if here or is_cached(name):
        return 0
    return next((one.download_bytes for one in MODELS if one.name == name), None)


def plan_html(plan: Plan, t: Texts, found: list[Fix] | None = None, more: bool = False) -> str:
    """Returns the bar with its words, and the changes that were found."""
    if plan.refusal:
        return render("new.plan_refused", t, plan=plan)
    numbers = plan.numbers
    available = plan.available_bytes or plan.required_bytes
    sizes = (plan.required_bytes, available, numbers["low_bytes"], numbers["high_bytes"])
    needs, has, low, high = (format_bytes(size, t) for size in sizes)
    maybe = plan.fits is False and numbers["low_bytes"] <= available
    verdict = "fits" if plan.fits else "may_not_fit" if maybe else "fits_not"
    # Both ends come out the same where the range is narrow.
    key = "new.needs_about" if low == high else "new.needs"
    length, batch = t.number(plan.length), numbers["run"]["batch_size"]
    best = numbers.get("recommended_method")
    return render(
        "new.plan",
        t,
        state={"fits": "fine", "may_not_fit": "careful", "fits_not": "bad"}[verdict],
        verdict=t(f"new.{verdict}"),
        needs=t(key, needs=needs, low=low, high=high, has=has),
        parts={
            part: sum(numbers["breakdown"].get(one, 0) for one in names)
            for part, names in PARTS.items()
        },
        most=max(available, plan.required_bytes),
        available=available,
        length=t(f"new.length_{plan.length_source}", length=length, batch=batch),
        fixes=found,
        searching=more,
        methods=numbers.get("methods"),
        best=best if best in ("lora", "qlora") else "none",
    )

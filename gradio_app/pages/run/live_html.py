"""HTML of the live view."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from gradio_app.chat.prompts import HeldOutPrompt
from gradio_app.pages import plot
from gradio_app.pages.templating import message, render
from gradio_app.runs.curves import (
    Points,
    downsample,
    finite_points,
    relative_increase,
    spread,
    trend,
)
from gradio_app.runs.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_metric,
    format_number,
    metric,
)
from gradio_app.runs.health import HealthWarning
from gradio_app.runs.metrics import Metrics
from gradio_app.texts import Texts
from lightning_peft.chat.answer_scores import is_exact

ARROWS = {-1: "\u2193", 0: "\u2192", 1: "\u2191"}
TREND_KEYS = {-1: "falling", 0: "steady", 1: "rising"}
# Kinds of alerts, with the numbers that their sentence needs.
ALERTS = {"nan": (), "diverging": ("first", "last"), "overfitting": ("times", "first", "last")}
METRICS = ("train_loss", "val_loss")
TABLE_ROWS = 40
MAX_OTHER_METRICS = 3
MAX_STEPS = 4
MAX_PROMPTS = 12
# Others are folded: on a phone each prompt takes a screen.
SHOWN_PROMPTS = 3
_MAX_CELL = 400
# JSON has few spaces: signs are words of their own.
_WORDS = re.compile(r"\w+|\W")
# Where so many pairs of words are equal, texts repeat themselves: comparing them takes minutes.
_MAX_PAIRS = 10_000
# No word of a text: what stands before it is compared from the end.
_END = "end\n"
Row = Mapping[str, Any]


def alerts(events: Sequence[Mapping[str, Any]], warned: Sequence[HealthWarning], t: Texts) -> str:
    """Returns the alerts."""
    found = [event for event in events if event.get("kind") in ALERTS or "alert" in event]
    rows = [*(_health_alert(one, t) for one in warned), *(_alert(event, t) for event in found)]
    return render("live.alerts", t, rows=rows) if rows else ""


def _alert(event: Mapping[str, Any], t: Texts) -> dict[str, Any]:
    kind = str(event.get("kind"))
    known = kind in ALERTS
    row = {
        "title": t(f"run.alert_{kind if known else 'other'}"),
        "step": event.get("step", 0),
        "text": _alert_text(event, t),
    }
    return {**row, "anchor": kind} if known else row


def _alert_text(event: Mapping[str, Any], t: Texts) -> str:
    """Returns an alert in the language of the page; the trainer's own words if it is a new one."""
    kind, seen = str(event.get("kind")), event.get("alert")
    if kind not in ALERTS:
        return str(event.get("text", ""))
    seen = seen if isinstance(seen, dict) else {}
    values = {name: seen.get(name) for name in ALERTS[kind]}
    said = {
        name: format_number(one, t) for name, one in values.items() if isinstance(one, (int, float))
    }
    if len(said) < len(values):
        # A run of a version that wrote words alone.
        return t(f"run.alert_{kind}_plain")
    if kind == "nan":
        of = seen.get("of")
        return t(f"run.alert_nan_{of}" if of in METRICS else "run.alert_nan_plain")
    return t(f"run.alert_{kind}_more", **said)


def _health_alert(one: HealthWarning, t: Texts) -> dict[str, Any]:
    values = {"stuck": format_duration(one.value, t), "disk": format_bytes(one.value, t)}
    value = values.get(one.kind, t.localized(f"{one.value:g}"))
    return {"title": t(f"run.warn_{one.kind}"), "text": t(f"run.warn_{one.kind}_more", value=value)}


def numbers(metrics: Metrics, t: Texts) -> str:
    """Returns the latest numbers, as a list of terms."""
    latest = metrics.latest
    cards = [_training(metrics, t), _validation(metrics, t)]
    if "learning_rate" in latest:
        cards.append((t("run.learning_rate"), format_number(latest["learning_rate"], t), ""))
    for name in ("tokens", "steps"):
        speed = latest.get(f"{name}_per_second")
        if speed:
            cards.append((t(f"run.speed_{name}"), format_count(speed, t), ""))
            break
    cards += _other_metrics(latest, t)
    memory = metrics.maximum("peak_cuda_bytes") or metrics.maximum("peak_process_bytes")
    if memory:
        cards.append((t("run.memory"), format_bytes(memory, t), ""))
    return render("parts.numbers", t, cards=cards, label=t("run.numbers"))


def _other_metrics(latest: Mapping[str, float], t: Texts) -> list[tuple[str, str, str]]:
    """Returns the other metrics of the validation rows."""
    names = [name for name in latest if name.startswith("val_") and name != "val_loss"]
    return [
        (metric(name, t), format_number(latest[name], t), "") for name in names[:MAX_OTHER_METRICS]
    ]


def _training(metrics: Metrics, t: Texts) -> tuple[str, str, str]:
    points = metrics.curve("train_loss")
    if not points:
        return t("run.train_loss"), "\u2013", ""
    word = _trend(points, t)
    known = finite_points(points)
    if not word and len(known) > 1:
        word = t("run.first", value=format_number(known[0][1], t), step=known[0][0])
    return t("run.train_loss"), format_metric(points[-1][1], t), word


def _trend(points: Points, t: Texts) -> str:
    """Returns where a curve goes, with its sign; nothing where that cannot be said yet."""
    way = trend(points)
    if way is None:
        return ""
    if relative_increase(points) and way < 1:
        return f"{ARROWS[1]} {t('run.above_start')}"
    return f"{ARROWS[way]} {t(f'run.{TREND_KEYS[way]}')}"


def _validation(metrics: Metrics, t: Texts) -> tuple[str, str, str]:
    points = finite_points(metrics.curve("val_loss"))
    if not points:
        return t("run.val_loss"), "\u2013", ""
    if len(points) == 1:
        return t("run.val_loss"), format_number(points[0][1], t), ""
    step, least = min(points, key=lambda point: point[1])
    best = t("run.best", value=format_number(least, t), step=step)
    first = t("run.before", value=format_number(points[0][1], t)) if points[0][0] == 0 else ""
    last_is_best = step == points[-1][0]
    more = first if last_is_best and first else best
    return t("run.val_loss"), format_number(points[-1][1], t), more


def summary(metrics: Metrics, t: Texts) -> str:
    """Returns in sentences what the curves show."""
    training, validation = (finite_points(metrics.curve(name)) for name in METRICS)
    if not training and not validation:
        return ""
    said = []
    if training:
        key = "run.curves_text" if len(training) > 1 else "run.curves_text_one"
        said.append(t(key, **_endpoints(training, t)))
        way = _trend(training, t).partition(" ")[2]
        said += [t("run.curves_trend", direction=way)] if way else []
    if validation:
        step, least = min(validation, key=lambda point: point[1])
        best = {"best": format_number(least, t), "best_step": step}
        key = "run.curves_validation" if len(validation) > 1 else "run.curves_validation_one"
        said.append(t(key, **best, **_endpoints(validation, t)))
    else:
        said.append(t("run.curves_no_validation"))
    return message("note", " ".join(said), t, role="")


def _endpoints(points: Points, t: Texts) -> dict[str, Any]:
    (begin, first), (end, last) = points[0], points[-1]
    values = {"first": format_number(first, t), "last": format_number(last, t)}
    return {**values, "from_step": begin, "to_step": end}


def curve_table(metrics: Metrics, t: Texts) -> str:
    """Returns the numbers of the curves as a table."""
    curves = {
        t(f"run.{name}"): downsample(metrics.curve(name), TABLE_ROWS)
        for name in (*METRICS, "learning_rate")
    }
    return plot.curve_table(curves, t("run.axis_step"), t)


def samples(rows: Sequence[Row], known: Sequence[HeldOutPrompt], t: Texts) -> str:
    """Returns the answers of a run to the same prompts at different steps.

    ``known`` are the validation rows whose turns are known.
    """
    said: dict[tuple[int, int], Row] = {}
    for row in rows:
        if isinstance(row.get("step"), int) and isinstance(row.get("sample"), int):
            said[row["step"], row["sample"]] = row
    if not said:
        return message("note", t("run.samples_empty"), t, role="")
    steps = spread(sorted({step for step, _ in said}), MAX_STEPS)
    places = sorted({place for _, place in said})
    columns = [(t("run.prompt"), ""), (t("run.expected"), "")]
    for step in steps:
        found = [said[step, place] for place in places if (step, place) in said]
        right = t("run.samples_right", n=sum(map(_is_correct, found)), of=len(found))
        columns.append(
            (t("run.after_step", step=step) if step else t("run.before_training"), right)
        )
    table = [_row(place, steps, said, known) for place in places[:MAX_PROMPTS]]
    return render("live.samples", t, columns=columns, rows=table, shown=SHOWN_PROMPTS)


def _row(
    place: int,
    steps: Sequence[int],
    said: Mapping[tuple[int, int], Row],
    known: Sequence[HeldOutPrompt],
) -> dict[str, Any]:
    first = next(row for (_, sample), row in said.items() if sample == place)
    prompt, expected = str(first.get("prompt", "")), str(first.get("expected", ""))
    answers = [answer_cell(said.get((step, place))) for step in steps]
    return {
        "turns": prompt_turns(prompt, expected, known),
        "expected": shortened_cell(expected),
        "answers": answers,
    }


def prompt_turns(
    prompt: str, expected: str, known: Sequence[HeldOutPrompt]
) -> list[tuple[str | None, str]]:
    """Returns roles and texts of a prompt where they are known, else its text without a role."""
    best: list[tuple[str, str]] = []
    for row in known:
        if row.turns is None or row.reference.strip() != expected.strip():
            continue
        turns = [*row.turns, ("user", row.prompt, row.images)]
        # A sample's text says where its images are.
        if any(images or text.strip() not in prompt for _, text, images in turns):
            continue
        # A short question occurs in others: what explains most of the prompt is taken.
        best = max(best, [(role, text.strip()) for role, text, _ in turns], key=_length)
    if not best:
        return [(None, shortened_cell(prompt))]
    return [(role, shortened_cell(text)) for role, text in best]


def _length(turns: Sequence[tuple[str, str]]) -> int:
    return sum(len(text) for _, text in turns)


def _is_correct(row: Row) -> bool:
    return is_exact(*(str(row.get(name, "")) for name in ("generated", "expected")))


def answer_cell(row: Row | None, most: int = _MAX_CELL) -> dict[str, Any] | None:
    """Returns an answer for ``live.samples``: its words, and which the expected one has not.

    Texts of more than ``most`` characters are shortened, and their words not compared.
    """
    if row is None:
        return None
    correct = _is_correct(row)
    text, expected = str(row.get("generated", "")).strip(), str(row.get("expected", ""))
    compared = not correct and len(text) <= most
    words = (
        _differences(text, expected.strip()[:most])
        if compared
        else [(shortened_cell(text, most), False)]
    )
    return {"words": words, "correct": correct, "cut": row.get("cut") is True and not correct}


def _differences(text: str, expected: str) -> list[tuple[str, bool]]:
    """Returns the parts of a text, and which of them are not expected."""
    found, wanted = (_WORDS.findall(one) for one in (text, expected))
    times = Counter(word for word in wanted if not _is_sign(word))
    # Where no word is shared, marks would say nothing.
    if not 0 < sum(times[word] for word in found) <= _MAX_PAIRS:
        return [(text, False)]
    # Signs count where words around them do: they alone are in every text.
    matcher = SequenceMatcher(_is_sign, [*found, _END], [*wanted, _END], autojunk=False)
    blocks = matcher.get_matching_blocks()
    same = {block.a + place for block in blocks for place in range(block.size)}
    differs = [place not in same and not word.isspace() for place, word in enumerate(found)]
    groups = groupby(zip(found, differs, strict=True), key=lambda one: one[1])
    return [("".join(word for word, _ in parts), different) for different, parts in groups]


def _is_sign(word: str) -> bool:
    return not word[0].isalnum()


def shortened_cell(text: object, most: int = _MAX_CELL) -> str:
    """Returns text of a run for a cell of a table, its lines kept."""
    words = str(text).strip()
    return words if len(words) <= most else words[:most] + "\u2026"

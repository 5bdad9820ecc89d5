"""The HTML of compared runs. Everything that a run has written is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gradio_app.compare.answers import compare_answers
from gradio_app.compare.outcomes import Outcome, outcome_of
from gradio_app.compare.recipe_diff import differences
from gradio_app.compare.selection import MAX_RUNS, RunSelection
from gradio_app.guards import escaped
from gradio_app.pages.run_state import state_badge
from gradio_app.recipe.fields import BY_PATH
from gradio_app.runs.formatting import format_bytes, format_duration, format_number, metric
from gradio_app.runs.metrics import Metrics
from gradio_app.texts import Texts

Curves = Mapping[str, Sequence[tuple[float, float]]]
TABLE_ROWS = 12
_MAX_CELL = 400
_MAX_DIFFERENCES = 60
_DASH = "\u2013"
# Settings that are chosen in other steps of the form than its fields.
_OTHER_STEPS = {
    "model.class_path": "task",
    "model.init_args.model": "model",
    "data.init_args.data": "data",
    "trainer.strategy.class_path": "method",
}


def notice(found: RunSelection, offered: int, t: Texts) -> str:
    """Returns what is said of runs that cannot be compared, and where there are too few."""
    parts = []
    if found.missing:
        names = ", ".join(found.missing)
        parts.append(
            f'<p class="not-now" role="alert">{escaped(t("compare.missing", runs=names))}</p>'
        )
    if found.too_many:
        parts.append(f'<p class="not-now" role="alert">{t("compare.too_many", most=MAX_RUNS)}</p>')
    if len(found.runs) < 2:
        parts.append(_empty(len(found.runs), offered, t))
    return "".join(parts)


def _empty(chosen: int, offered: int, t: Texts) -> str:
    title, more, link = t("compare.empty"), t("compare.empty_more"), ""
    if offered < 2:
        title, more = t("compare.none"), t("compare.none_more")
        link = f'<p><a class="as-button" href="{t.url("new")}">{t("compare.to_new")}</a></p>'
    elif chosen == 1:
        title = t("compare.one_more")
    text = f"<p><strong>{title}</strong></p><p>{more}</p>{link}"
    return f'<div class="nothing" role="status">{text}</div>'


def summary(curves: Curves, loss: str, axis: str, ranked: bool, t: Texts) -> str:
    """Returns in sentences what the curves show.

    Args:
        curves: Points of each run.
        loss: Which loss they are of.
        axis: What they are over.
        ranked: Whether their losses can be ranked: of other rows they cannot.
        t: Texts.
    """
    said, ends = [], {}
    for label, points in curves.items():
        if not points:
            said.append(t("compare.no_curve", run=label, loss=t(f"run.{loss}")))
            continue
        ends[label] = points[-1][1]
        least = min(value for _, value in points)
        said.append(
            t(
                "compare.curve",
                run=label,
                first=format_number(points[0][1], t),
                last=format_number(points[-1][1], t),
                at=_position(points[-1][0], axis, t),
                least=format_number(least, t),
            )
        )
    if not ranked:
        said.insert(0, t("compare.not_comparable"))
    elif len(ends) > 1:
        best = min(ends, key=lambda label: ends[label])
        lowest = format_number(ends[best], t)
        said.insert(0, t("compare.best", run=best, loss=t(f"run.{loss}"), value=lowest))
    items = "".join(f"<li>{escaped(sentence)}</li>" for sentence in said)
    return f'<div role="status"><ul class="said">{items}</ul></div>'


def _position(x: float, axis: str, t: Texts) -> str:
    return (
        t("compare.at_step", step=int(x))
        if axis == "step"
        else t("compare.at_minute", n=t.localized(f"{x:.3g}"))
    )


def curve_table(curves: Curves, axis: str, t: Texts) -> str:
    """Returns the curves as a table: of each run some points, the last one among them."""
    chosen = {label: _sample_points(points) for label, points in curves.items()}
    places = sorted({x for points in chosen.values() for x in points})
    head = [t(f"compare.axis_{axis}"), *curves]
    rows = [
        (
            format_number(x, t),
            [format_number(points[x], t) if x in points else "" for points in chosen.values()],
        )
        for x in places
    ]
    return _table(t("run.as_table"), head, rows)


def _sample_points(points: Sequence[tuple[float, float]]) -> dict[float, float]:
    if len(points) <= TABLE_ROWS:
        return dict(points)
    last = len(points) - 1
    return dict(points[round(last * place / (TABLE_ROWS - 1))] for place in range(TABLE_ROWS))


def outcomes(found: RunSelection, metrics: Sequence[Metrics], t: Texts) -> str:
    """Returns what came of the runs."""
    known = [outcome_of(run, one) for run, one in zip(found.runs, metrics, strict=True)]
    names = dict.fromkeys(name for one in known for name in one.after)
    rows: list[tuple[str, list[str]]] = [
        (metric(name, t), [_change(one, name, t) for one in known]) for name in names
    ]
    for key, values in (
        ("steps", [_optional_number(one.steps, t) for one in known]),
        ("time", [format_duration(one.seconds, t) if one.seconds else "" for one in known]),
        ("memory", [format_bytes(one.memory, t) if one.memory else "" for one in known]),
        ("trainable", [_optional_number(one.trainable, t) for one in known]),
    ):
        rows.append((t(f"compare.{key}"), values))
    links = [
        f'<a href="{escaped(t.url("run", run=run.id))}">{escaped(label)}</a> {state_badge(run, t)}'
        for run, label in zip(found.runs, found.labels, strict=True)
    ]
    title = t("compare.outcomes")
    note = f'<p class="note">{t("compare.outcomes_note")}</p>'
    return f"<h2>{title}</h2>{note}" + _table(title, [""], rows, heads=links)


def _change(one: Outcome, name: str, t: Texts) -> str:
    if name not in one.after:
        return ""
    after = format_number(one.after[name], t)
    return f"{format_number(one.before[name], t)} \u2192 {after}" if name in one.before else after


def _optional_number(value: int | None, t: Texts) -> str:
    return "" if value is None else t.number(value)


def settings_diff(found: RunSelection, t: Texts) -> str:
    """Returns the settings that differ."""
    seen = differences([run.recipe_text for run in found.runs])
    parts = [f"<h2>{t('compare.settings')}</h2>"]
    for place in seen.unreadable:
        text = t("compare.unreadable", run=found.labels[place])
        parts.append(f'<p class="note">{escaped(text)}</p>')
    rows = [
        (name, [_DASH if value is None else _shorten(value) for value in values])
        for name, values in sorted(seen.rows, key=lambda row: not _label(row[0], t))
    ][:_MAX_DIFFERENCES]
    if rows:
        head = [t("compare.setting"), *found.labels]
        parts.append(_table(t("compare.settings"), head, rows, settings=t))
    else:
        parts.append(f"<p>{t('compare.no_difference')}</p>")
    rest = len(seen.rows) - len(rows)
    more = t("compare.more_differ", n=rest) if rest > 0 else ""
    parts.append(f'<p class="note">{more} {t("compare.same", n=seen.same)}</p>')
    return "".join(parts)


def _label(path: str, t: Texts) -> str:
    """Returns what the form calls a setting; empty for one that it does not have."""
    if path in BY_PATH:
        return t(f"fields.{BY_PATH[path].key}")
    return t(f"compare.path_{_OTHER_STEPS[path]}") if path in _OTHER_STEPS else ""


def samples(found: RunSelection, t: Texts) -> str:
    """Returns what the runs said to the same prompts."""
    title, said = t("compare.samples"), compare_answers(found.runs)
    if not said:
        asked = any(run.folder.samples.is_file() for run in found.runs)
        why = t("compare.no_shared_samples" if asked else "compare.no_samples")
        return f'<h2>{title}</h2><p class="note">{why}</p>'
    head = [t("run.prompt"), t("run.expected"), *found.labels]
    rows = [
        (
            _shorten(one.prompt),
            [
                _shorten(one.expected),
                *(
                    t("compare.not_asked") if answer is None else _shorten(answer)
                    for answer in one.answers
                ),
            ],
        )
        for one in said
    ]
    note = f'<p class="note">{t("compare.samples_note")}</p>'
    return f"<h2>{title}</h2>{note}" + _table(title, head, rows, kind="samples")


def _shorten(text: str) -> str:
    words = text.strip()
    return words if len(words) <= _MAX_CELL else words[:_MAX_CELL] + "\u2026"


def _table(
    label: str,
    head: Iterable[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    heads: Iterable[str] = (),
    kind: str = "",
    settings: Texts | None = None,
) -> str:
    """Returns a table that scrolls inside itself.

    Args:
        label: What it is called.
        head: Titles of columns.
        rows: Title and cells of each row.
        heads: Titles that are HTML already, after the others.
        kind: CSS class.
        settings: Texts, where the titles of rows are paths of settings.
    """
    titles = [*map(escaped, head), *heads]
    top = "".join(f'<th scope="col">{title}</th>' if title else "<td></td>" for title in titles)
    body = ""
    for title, cells in rows:
        name = escaped(title)
        if settings is not None:
            label = _label(title, settings)
            name = f'<span title="{name}">{escaped(label)}</span>' if label else name
            name = name if label else f"<code>{name}</code>"
        body += f'<tr><th scope="row">{name}</th>'
        body += "".join(f"<td>{escaped(cell) or _DASH}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escaped(label)}">'
        f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )

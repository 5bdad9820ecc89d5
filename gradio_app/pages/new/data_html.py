"""What a look at the data has found, as HTML: counts, problems, rows, and what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradio_app.guards import escaped
from gradio_app.pages.new import file_format
from gradio_app.recipe.preview import DataReport
from gradio_app.recipe.table import Table
from gradio_app.redaction import UPLOAD
from gradio_app.texts import Texts
from gradio_app.uploads import original_name

# Of each kind of problem, as many rows are listed one by one.
MAX_PROBLEMS = 20
_MAX_SPAN = 4000


def selected_data(place: str, t: Texts) -> str:
    """Returns the line that names the data, or asks for some."""
    if not place:
        return f'<p class="not-now" role="status">{escaped(t("new.data_none"))}</p>'
    if place.startswith(("package:", "recipe:")):
        text = t("new.data_is_example", name=place.rpartition("/")[2])
    else:
        shown = "-".join(place.split("-")[2:]) if place.startswith(UPLOAD) else place
        text = t("new.data_chosen", name=shown)
    return f'<p class="chosen" role="status">{escaped(text)}</p>'


def choose_data(t: Texts) -> str:
    """Returns the report where no data is chosen."""
    return f'<p class="note">{escaped(t("new.data_then"))}</p>'


def checking(t: Texts, rows: int = 0, of: int | None = None, first: Table | None = None) -> str:
    """Returns the progress shown while the data is checked.

    Args:
        t: The texts.
        rows: How many rows have been read.
        of: How many there are, where that is known.
        first: The first of them.
    """
    text = t("new.checking")
    if rows:
        known = {"rows": t.number(rows), "of": t.number(max(rows, of or 0))}
        text = t("new.checking_of" if of else "new.checking_rows", **known)
    table = _table(first, t, opened=True) if first is not None and first.rows else ""
    return f'<p class="busy" role="status">{escaped(text)}</p>{table}'


def report(found: DataReport, t: Texts) -> str:
    """Returns everything that was found."""
    parts = []
    if found.refusal and found.needs_column_names:
        names = ", ".join(found.table.columns if found.table else [])
        parts.append(
            f'<section class="failure" role="alert"><h4>{escaped(t("new.columns_unknown"))}</h4>'
            f"<p>{escaped(t('new.columns_say', names=names))}</p></section>"
        )
    elif found.refusal:
        parts.append(
            f'<section class="failure" role="alert"><h4>{escaped(t("new.data_refused"))}</h4>'
            f"<pre>{escaped(found.refusal)}</pre></section>"
        )
    numbers = found.numbers
    if numbers.get("series"):
        parts.append(f'<p class="fine" role="status">{escaped(t("new.series"))}</p>')
    elif numbers:
        parts += [file_format.detected_formats(found, t), _verdict(found, t), _problems(found, t)]
        parts += [_no_validation_warning(numbers, t), _facts(numbers, t)]
        parts += [_token_preview(numbers, t), _lengths(numbers, t)]
    if found.table is not None and found.table.rows:
        parts.append(_table(found.table, t))
    return "".join(parts)


def _verdict(found: DataReport, t: Texts) -> str:
    rows, rejected = found.numbers.get("rows", 0), found.numbers.get("rejected", 0)
    if not found.problems:
        text = t("new.all_fine", rows=t.number(rows))
        return f'<p class="fine" role="status">\u2713 {escaped(text)}</p>'
    key = "new.some_skipped" if found.skipping else "new.some_bad"
    text = escaped(t(key, rejected=t.number(rejected), rows=t.number(rows)))
    if found.skipping:
        return f'<p class="careful" role="status">! {text}</p>'
    # The others must be worth training on.
    button = ""
    if rejected < rows:
        label = escaped(t("new.skip_these", rejected=t.number(rejected)))
        button = f' <button type="button" class="as-button small" data-act="skip">{label}</button>'
    return f'<p class="bad" role="alert">\u2717 {text}{button}</p>'


def _no_validation_warning(numbers: dict[str, Any], t: Texts) -> str:
    splits = numbers.get("splits", {})
    if not splits.get("train", {}).get("rows") or splits.get("validation", {}).get("rows"):
        return ""
    return f'<p class="careful" role="status">! {escaped(t("new.no_validation"))}</p>'


def _problems(found: DataReport, t: Texts) -> str:
    parts = []
    for one in found.problems:
        title = t.has(f"new.problem_{one['kind']}")
        heading = t(f"new.problem_{one['kind']}") if title else one["title"]
        todo = t(f"new.todo_{one['kind']}") if title else one["what_to_do"]
        rows = one["rows"][:MAX_PROBLEMS]
        listed = "".join(
            f"<li><strong>{escaped(t('new.row', row=row['row']))}</strong> "
            f"{escaped(row['detail'])} "
            f"<span class='file'>{escaped(original_name(row['file']))}</span></li>"
            for row in rows
        )
        more = len(one["rows"]) - len(rows)
        rest = escaped(t("new.more_rows", more=more, numbers=one["numbers"])) if more > 0 else ""
        parts.append(
            f'<section class="problem"><h4>{escaped(heading)} ({t.number(len(one["rows"]))})</h4>'
            f"<p>{escaped(t('new.what_to_do', what=todo))}</p><ul>{listed}</ul>"
            f"{f'<p>{rest}</p>' if rest else ''}</section>"
        )
    return "".join(parts)


def _facts(numbers: dict[str, Any], t: Texts) -> str:
    splits = numbers.get("splits", {})
    columns = ", ".join(
        str(ours) if ours == theirs else f"{ours} \u2190 {theirs}"
        for ours, theirs in numbers.get("columns", {}).items()
    )
    shape = numbers.get("shape", {}).get("name", "")
    facts = [
        (t("new.fact_shape"), t(f"new.shape_{shape}") if shape else "", columns),
        *(
            (t(f"new.fact_{name}"), t.number(splits.get(name, {}).get("rows", 0)), "")
            for name in ("train", "validation", "test")
        ),
        (
            t("new.fact_duplicates"),
            t.number(sum(split.get("duplicates", 0) for split in splits.values())),
            "",
        ),
    ]
    if "trained_share" in numbers:
        share = f"{numbers['trained_share']:.0%}"
        trained = t.number(splits["train"].get("trained_tokens", 0))
        facts.append((t("new.fact_trained"), share, t("new.fact_tokens", tokens=trained)))
    if numbers.get("labels"):
        labels = list(map(str, numbers["labels"]))
        shown = ", ".join(labels[:12]) + (" \u2026" if len(labels) > 12 else "")
        facts.append((t("new.fact_labels"), f"{len(labels)}", shown))
    if numbers.get("keys_unused"):
        unused = ", ".join(str(one["key"]) for one in numbers["keys_unused"])
        facts.append((t("new.fact_unused"), str(len(numbers["keys_unused"])), unused))
    cells = "".join(
        f"<div><dt>{escaped(title)}</dt><dd><strong>{escaped(value)}</strong>"
        f"<span>{escaped(more)}</span></dd></div>"
        for title, value, more in facts
    )
    return f'<dl class="numbers data-numbers">{cells}</dl>'


def _token_preview(numbers: dict[str, Any], t: Texts) -> str:
    rows = numbers.get("first_rows", [])
    if not rows:
        return ""
    any_trained = any(run["trained"] for row in rows for run in row["runs"])
    legend = (
        f'<p class="legend"><span class="trained">{escaped(t("new.legend_trained"))}</span> '
        f'<span class="read">{escaped(t("new.legend_read"))}</span></p>'
        if any_trained
        else ""
    )
    shown = "".join(
        f'<li><span class="which">{escaped(t("new.row", row=row["row"]))}</span>'
        f"<div>{''.join(_text_span(run, t) for run in row['runs'])}</div></li>"
        for row in rows
    )
    return (
        f"<h4>{escaped(t('new.as_trained'))}</h4>{legend}"
        f'<ol class="tokens" tabindex="0" aria-label="{escaped(t("new.as_trained"))}">{shown}</ol>'
    )


def _text_span(run: dict[str, Any], t: Texts) -> str:
    text = str(run["text"])
    text = text if len(text) <= _MAX_SPAN else text[:_MAX_SPAN] + " \u2026"
    if not run["trained"]:
        return f"<span>{escaped(text)}</span>"
    # For those who do not see the line and the colour.
    begin, end = escaped(t("new.trained_begins")), escaped(t("new.trained_ends"))
    return (
        f'<mark><span class="unseen">{begin} </span>{escaped(text)}'
        f'<span class="unseen"> {end}</span></mark>'
    )


def _lengths(numbers: dict[str, Any], t: Texts) -> str:
    lengths = numbers.get("lengths")
    if not lengths:
        return ""
    buckets = lengths["buckets"]
    most = max(bucket["rows"] for bucket in buckets) or 1
    rows = "".join(
        f'<tr><th scope="row">{t.number(bucket["from"])}\u2013{t.number(bucket["to"])}</th>'
        f"<td>{t.number(bucket['rows'])}</td>"
        f'<td class="graph" aria-hidden="true">'
        f'<span style="width:{100 * bucket["rows"] / most:.1f}%"></span></td></tr>'
        for bucket in buckets
    )
    said = t(
        "new.lengths_said",
        mean=t.number(lengths["mean"]),
        longest=t.number(lengths["longest"]),
        most=t.number(numbers.get("max_length", 0)),
    )
    heads = "".join(
        f'<th scope="col">{escaped(t(f"new.{name}"))}</th>' for name in ("tokens", "rows")
    )
    return (
        f"<h4>{escaped(t('new.lengths'))}</h4><p>{escaped(said)}</p>"
        f'<table class="lengths"><thead><tr>{heads}<td></td></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _table(table: Table, t: Texts, opened: bool = False) -> str:
    heads = "".join(f'<th scope="col">{escaped(name)}</th>' for name in ("#", *table.columns))
    body = "".join(_cells(number, row) for number, row in enumerate(table.rows, start=1))
    title = escaped(t("new.first_rows", count=len(table.rows)))
    return (
        f'<details class="rows"{" open" if opened else ""}><summary>{title}</summary>'
        f'<div class="wide" role="region" tabindex="0" aria-label="{title}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _cells(number: int, row: Iterable[str]) -> str:
    cells = "".join(f"<td>{escaped(value)}</td>" for value in row)
    return f'<tr><th scope="row">{number}</th>{cells}</tr>'

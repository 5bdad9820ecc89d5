"""HTML of the data step: counts, problems, rows and trained tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradio_app.pages.new import file_format
from gradio_app.pages.new.file_format import file_title
from gradio_app.pages.templating import message, render
from gradio_app.recipe.preview import DataReport
from gradio_app.recipe.table import Table
from gradio_app.redaction import UPLOAD, short_name
from gradio_app.texts import Texts

# Of each kind of problem, as many rows are listed one by one.
MAX_PROBLEMS = 20
_MAX_LABELS = 12
_MAX_LABEL_ROWS = 30
_MAPPED_ROWS = 3
_SPLITS = ("train", "validation", "test")


def selected_data(place: str, t: Texts) -> str:
    """Returns the line that names the data, or requests some."""
    if not place:
        return message("not-now", t("new.data_none"), t)
    marked = place.startswith(("package:", "recipe:", UPLOAD))
    return message("chosen", short_name(place) if marked else place, t)


def checking(
    t: Texts,
    rows: int = 0,
    of: int | None = None,
    first: Table | None = None,
    early: DataReport | None = None,
) -> str:
    """Returns the progress while the data is checked: rows read, of how many, and the first.

    ``early`` is what is known of the first rows of a large file.
    """
    text = t("new.checking")
    if rows:
        known = {"rows": t.number(rows), "of": t.number(max(rows, of or 0))}
        text = t("new.checking_of" if of else "new.checking_rows", **known)
    numbers = early.numbers if early else {}
    shown = numbers and {
        "rows": numbers.get("rows", 0),
        "facts": _facts(numbers, t),
        "labels": _labels(numbers, t),
        "lengths": numbers.get("lengths"),
        "max_length": numbers.get("max_length", 0),
        "shown": _shown_rows(numbers, t),
    }
    return render("data.checking", t, text=text, first=first, early=shown)


def report(found: DataReport, t: Texts) -> str:
    """Returns everything that was found."""
    splits = {name: one.get("rows") for name, one in found.numbers.get("splits", {}).items()}
    return render(
        "data.report",
        t,
        found=found,
        read_as=file_format.unusual_formats(found, t),
        facts=_facts(found.numbers, t),
        labels=_labels(found.numbers, t),
        longest=_longest_rows(found.numbers, t),
        problems=[_problem(one, found.numbers, t) for one in found.problems],
        shown=_shown_rows(found.numbers, t),
        unvalidated=splits.get("train") and not splits.get("validation"),
    )


def found_rows(found: DataReport, t: Texts) -> str:
    """Returns the rows of a search, and in how many its text occurs."""
    search, rows = found.numbers["search"], _shown_rows(found.numbers, t)
    known = {"text": search["text"], "rows": t.number(search["rows"])}
    said = t("data.found", **known) if search["rows"] else t("data.not_found", **known)
    if len(rows) < search["rows"]:
        said = t("data.found_more", shown=t.number(len(rows)), **known)
    return render("data.found_rows", t, text=said, rows=rows)


def mapped_rows(found: DataReport, columns: Mapping[str, str], t: Texts) -> str:
    """Returns the first rows of the file under the names of the fields they are mapped to."""
    table = found.table
    shown = {ours: theirs for ours, theirs in columns.items() if theirs}
    if table is None or not shown or not set(shown.values()) <= set(table.columns):
        return ""
    places = [table.columns.index(theirs) for theirs in shown.values()]
    rows = [
        (t("new.row", row=number), [row[place] for place in places])
        for number, row in enumerate(table.rows[:_MAPPED_ROWS], start=1)
    ]
    return render("data.mapped", t, names=[t(f"new.field_{name}") for name in shown], rows=rows)


def _problem(one: dict[str, Any], numbers: dict[str, Any], t: Texts) -> dict[str, Any]:
    known = t.has(f"new.problem_{one['kind']}")
    rows = one["rows"][:MAX_PROBLEMS]
    more, places = len(one["rows"]) - len(rows), str(one["numbers"])
    for file in {row["file"] for row in one["rows"]}:
        places = places.replace(f" of {file}", t("new.rows_of", file=file))
    return {
        "title": t(f"new.problem_{one['kind']}") if known else one["title"],
        "todo": t(f"new.todo_{one['kind']}") if known else one["what_to_do"],
        "rows": [(row["row"], row["detail"], file_title(row["file"], numbers)) for row in rows],
        "count": t.number(len(one["rows"])),
        "rest": t("new.more_rows", more=more, numbers=places) if more > 0 else "",
    }


def _facts(numbers: dict[str, Any], t: Texts) -> list[tuple[str, str, str]]:
    splits = numbers.get("splits", {})
    columns = ", ".join(
        str(ours) if ours == theirs else f"{ours} \u2190 {theirs}"
        for ours, theirs in numbers.get("columns", {}).items()
    )
    shape = numbers.get("shape", {}).get("name", "")
    facts = [(t("new.fact_shape"), t(f"new.shape_{shape}") if shape else "", columns)]
    about = numbers.get("statistics", {})
    counts = {name: splits.get(name, {}).get("rows", 0) for name in _SPLITS}
    counts["duplicates"] = about.get("duplicates", 0)
    for name, rows in counts.items():
        # Of training and validation also that there are none.
        if rows or name in _SPLITS[:2]:
            facts.append((t(f"new.fact_{name}"), t.number(rows), ""))
    if "tokens" in about:
        lengths = numbers.get("lengths") or {"median": 0, "percentile_95": 0}
        known = {"median": t.number(lengths["median"]), "high": t.number(lengths["percentile_95"])}
        facts.append((t("data.fact_tokens"), t.number(about["tokens"]), t("data.typical", **known)))
    if "trained_share" in numbers:
        share = f"{numbers['trained_share']:.0%}"
        trained = t.number(splits["train"].get("trained_tokens", 0))
        facts.append((t("new.fact_trained"), share, trained))
    facts += _content_facts(numbers, t)
    if unused := [str(one["key"]) for one in numbers.get("keys_unused") or ()]:
        facts.append((t("new.fact_unused"), f"{len(unused)}", ", ".join(unused)))
    return facts


def _content_facts(numbers: dict[str, Any], t: Texts) -> list[tuple[str, str, str]]:
    facts, about = [], numbers.get("statistics", {})
    if turns := about.get("turns"):
        between = {"least": t.number(turns["least"]), "most": t.number(turns["most"])}
        shown = t.number(turns["least"])
        if turns["least"] != turns["most"]:
            shown = t("data.turns", **between)
        facts.append((t("data.fact_turns"), shown, _counts(turns["roles"], t)))
    for name in ("writing", "languages"):
        if found := about.get(name):
            # ISO 639, also with a region: "de-AT".
            keys = {one: f"languages.{re.split('[-_]', one)[0].lower()}" for one in found}
            found = {t(key) if t.has(key) else one: found[one] for one, key in keys.items()}
            facts.append((t(f"data.fact_{name}"), t.number(len(found)), _counts(found, t)))
    if near := about.get("near_duplicates"):
        rows = [
            t("data.near", row=_numbered(one, numbers), like=_numbered(one, numbers, "like_"))
            for one in about["near_duplicate_rows"]
        ]
        facts.append((t("data.fact_near"), t.number(near), ", ".join(rows)))
    twice = {name: about.get(name, 0) for name in ("in_two_splits", "shared_prompts")}
    if any(twice.values()):
        known = {name: t.number(count) for name, count in twice.items()}
        total = t.number(sum(twice.values()))
        facts.append((t("data.fact_overlap"), total, t("data.overlap", **known)))
    return facts


def _counts(counts: dict[str, int], t: Texts) -> str:
    shown = [f"{name} {t.number(count)}" for name, count in list(counts.items())[:_MAX_LABELS]]
    return ", ".join(shown) + (" \u2026" if len(counts) > _MAX_LABELS else "")


def _labels(numbers: dict[str, Any], t: Texts) -> list[tuple[str, list[str], float]]:
    """Returns the labels of training rows: name, rows of each split, share of the most frequent."""
    by_split = numbers.get("statistics", {}).get("label_counts", {})
    train = by_split.get("train", {})
    most = max(train.values(), default=1)
    # Also labels that only other splits have.
    names = list(dict.fromkeys(name for counts in by_split.values() for name in counts))
    return [
        (
            name,
            [t.number(by_split.get(split, {}).get(name, 0)) for split in ("train", "validation")],
            100 * train.get(name, 0) / most,
        )
        for name in names[:_MAX_LABEL_ROWS]
    ]


def _longest_rows(numbers: dict[str, Any], t: Texts) -> list[tuple[str, list[str]]]:
    found = numbers.get("statistics", {}).get("longest_rows", [])
    return [(_place(one, numbers, t), [t.number(one["length"]), one["text"]]) for one in found]


def _shown_rows(numbers: dict[str, Any], t: Texts) -> list[dict[str, Any]]:
    return [{**row, "place": _place(row, numbers, t)} for row in numbers.get("first_rows") or ()]


def _place(row: dict[str, Any], numbers: dict[str, Any], t: Texts) -> str:
    return t("new.row", row=_numbered(row, numbers))


def _numbered(row: dict[str, Any], numbers: dict[str, Any], of: str = "") -> str:
    """Returns the number of a row, with its file where rows of several are read."""
    number = row[f"{of}row"]
    several = len(numbers.get("read_as") or ()) > 1
    return f"{number} ({file_title(row[f'{of}file'], numbers)})" if several else str(number)

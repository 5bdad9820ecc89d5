"""The HTML of the data step: counts, problems, rows, and what is trained."""

from __future__ import annotations

from typing import Any

from gradio_app.pages.new import file_format
from gradio_app.pages.templating import message, render
from gradio_app.recipe.preview import DataReport
from gradio_app.recipe.table import Table
from gradio_app.redaction import UPLOAD
from gradio_app.texts import Texts
from gradio_app.uploads import original_name

# Of each kind of problem, as many rows are listed one by one.
MAX_PROBLEMS = 20
_MAX_LABELS = 12


def selected_data(place: str, t: Texts) -> str:
    """Returns the line that names the data, or asks for some."""
    if not place:
        return message("not-now", t("new.data_none"), t)
    if place.startswith(("package:", "recipe:")):
        return message("chosen", t("new.data_is_example", name=place.rpartition("/")[2]), t)
    shown = "-".join(place.split("-")[2:]) if place.startswith(UPLOAD) else place
    return message("chosen", t("new.data_chosen", name=shown), t)


def checking(t: Texts, rows: int = 0, of: int | None = None, first: Table | None = None) -> str:
    """Returns the progress while the data is checked: rows read, of how many, and the first."""
    text = t("new.checking")
    if rows:
        known = {"rows": t.number(rows), "of": t.number(max(rows, of or 0))}
        text = t("new.checking_of" if of else "new.checking_rows", **known)
    return render("data.checking", t, text=text, first=first)


def report(found: DataReport, t: Texts) -> str:
    """Returns everything that was found."""
    splits = {name: one.get("rows") for name, one in found.numbers.get("splits", {}).items()}
    return render(
        "data.report",
        t,
        found=found,
        read_as=file_format.unusual_formats(found, t),
        facts=_facts(found.numbers, t),
        problems=[_problem(one, t) for one in found.problems],
        unvalidated=splits.get("train") and not splits.get("validation"),
    )


def _problem(one: dict[str, Any], t: Texts) -> dict[str, Any]:
    known = t.has(f"new.problem_{one['kind']}")
    rows = one["rows"][:MAX_PROBLEMS]
    more = len(one["rows"]) - len(rows)
    return {
        "title": t(f"new.problem_{one['kind']}") if known else one["title"],
        "todo": t(f"new.todo_{one['kind']}") if known else one["what_to_do"],
        "rows": [(row["row"], row["detail"], original_name(row["file"])) for row in rows],
        "count": t.number(len(one["rows"])),
        "rest": t("new.more_rows", more=more, numbers=one["numbers"]) if more > 0 else "",
    }


def _facts(numbers: dict[str, Any], t: Texts) -> list[tuple[str, str, str]]:
    splits = numbers.get("splits", {})
    columns = ", ".join(
        str(ours) if ours == theirs else f"{ours} \u2190 {theirs}"
        for ours, theirs in numbers.get("columns", {}).items()
    )
    shape = numbers.get("shape", {}).get("name", "")
    facts = [(t("new.fact_shape"), t(f"new.shape_{shape}") if shape else "", columns)]
    for name in ("train", "validation", "test"):
        rows = splits.get(name, {}).get("rows", 0)
        facts.append((t(f"new.fact_{name}"), t.number(rows), ""))
    duplicates = sum(split.get("duplicates", 0) for split in splits.values())
    facts.append((t("new.fact_duplicates"), t.number(duplicates), ""))
    if "trained_share" in numbers:
        share = f"{numbers['trained_share']:.0%}"
        trained = t.number(splits["train"].get("trained_tokens", 0))
        facts.append((t("new.fact_trained"), share, t("new.fact_tokens", tokens=trained)))
    if labels := [str(one) for one in numbers.get("labels") or ()]:
        shown = ", ".join(labels[:_MAX_LABELS]) + (" \u2026" if labels[_MAX_LABELS:] else "")
        facts.append((t("new.fact_labels"), f"{len(labels)}", shown))
    if unused := [str(one["key"]) for one in numbers.get("keys_unused") or ()]:
        facts.append((t("new.fact_unused"), f"{len(unused)}", ", ".join(unused)))
    return facts

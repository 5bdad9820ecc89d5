"""HTML of the latest benchmark results of a run."""

from __future__ import annotations

from typing import Any

from gradio_app.pages.templating import render
from gradio_app.runs.files import number, object_below, read_json_object
from gradio_app.runs.types import Run
from gradio_app.texts import Texts


def evaluation(run: Run, t: Texts) -> str:
    """Returns the newest results of ``lightning-peft evaluate``; nothing where there are none."""
    files = sorted(run.folder.evaluations.glob("*.json"))
    report = run.redactor.value(read_json_object(files[-1])) if files else {}
    compared, results = report.get("compared"), report.get("results")
    if not isinstance(compared, list) or not isinstance(results, list) or not compared:
        return ""
    names = [str(name) for name in compared]
    differences = [t("run.evaluation_difference", name=name) for name in names[1:]]
    return render(
        "live.evaluation",
        t,
        head=[t("run.evaluation_task"), *names, *differences],
        rows=[_row(row, names, t) for row in results if isinstance(row, dict)],
        version=str(object_below(report, "harness").get("version", "")),
        date=str(report.get("evaluated", ""))[:10],
    )


def _row(row: dict[str, Any], names: list[str], t: Texts) -> tuple[str, list[str]]:
    filtered = row.get("filter")
    metric = f"{row.get('metric')} ({filtered})" if filtered != "none" else row.get("metric")
    lower = t("run.evaluation_lower") if row.get("higher_is_better") is False else ""
    cells = [_with_error(object_below(row, "values", name), "", t) for name in names]
    cells += [_with_error(object_below(row, "differences", name), "+", t) for name in names[1:]]
    return f"{row.get('task')}: {metric}{lower}", cells


def _with_error(found: dict[str, Any], sign: str, t: Texts) -> str:
    value, error = number(found.get("value")), number(found.get("stderr"))
    if value is None:
        return "\u2013"
    return t.localized(f"{value:{sign}.4f}" + (f" \u00b1 {error:.4f}" if error is not None else ""))

"""Sweeps: values typed in the form, and the trials recorded by a sweep."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.recipe.command_worker import CommandWorker
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.fields import FIELDS, Field
from gradio_app.recipe.form import applies, format_value, parse_value
from gradio_app.recipe.preview import error_message
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.files import number, read_json_object
from gradio_app.runs.local import LocalExecutor, skipped_rows_file
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from lightning_peft.runs.status import write_json

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("none", "median", "hyperband")
MAX_TRIALS = 500
_SECONDS = 300.0
_KINDS = ("integer", "number", "choice", "switch", "batches")
_RANGE = re.compile(r"(.+?)\.\.(.+?)(:log)?")
_SKIPPED = "data.init_args.skip_bad_rows"


def is_available() -> bool:
    """Whether the package is installed that chooses what is tried."""
    return find_spec("optuna") is not None


def swept_fields(content: dict[str, Any]) -> list[Field]:
    """Returns the settings of a recipe that can be tried with several values."""
    return [
        field
        for field in FIELDS
        if field.kind in _KINDS and "callbacks" not in field.path and applies(field, content)
    ]


def tried_values(field: Field, text: str, comma: bool = False) -> tuple[str, int | None]:
    """Returns the value of ``--set`` for the text of a setting, and the number of values in it.

    Values are parted by ``;``, or by commas where there is none; ``1e-5..1e-3:log`` is a range, of
    which nothing is counted. With ``comma``, as in German, ``0,1`` is one number where fractions
    are possible. Raises UserError for values that the setting does not take.
    """
    text = text.strip()
    if found := _RANGE.fullmatch(text):
        *ends, scale = found.groups()
        low, high = (_parsed(field, end) for end in ends)
        numbers = field.kind not in ("choice", "switch") and None not in (low, high)
        if not (numbers and low < high):
            raise UserError("new.sweep_order", value=shortened(text))
        return f"{format_value(low)}..{format_value(high)}{scale or ''}", None
    fraction = comma and field.kind in ("number", "batches") and re.fullmatch(r"\d*,\d+", text)
    parts = [part.strip() for part in text.split(";" if ";" in text or fraction else ",")]
    values = [format_value(_parsed(field, part)) or "null" for part in parts if part]
    if not values:
        raise UserError("checks.needed")
    return ",".join(dict.fromkeys(values)), len(set(values))


def _parsed(field: Field, text: str) -> Any:
    if field.kind == "switch":
        return parse_value(field, {"true": True, "false": False}.get(text.strip().lower(), text))
    return parse_value(field, "" if text.strip() == "null" else text)


@dataclass(frozen=True)
class SweepRequest:
    """What is tried: values by path, as ``--set`` takes them, and how.

    ``trials`` is ``None`` for a grid, which has as many as there are combinations.
    """

    values: dict[str, str]
    sampler: str
    trials: int | None
    pruner: str

    def words(self) -> list[str]:
        """Returns the arguments of ``lightning-peft sweep``."""
        sets = [word for path, text in self.values.items() for word in ("--set", f"{path}={text}")]
        trials = [] if self.trials is None else [f"--trials={self.trials}"]
        return [*sets, f"--sampler={self.sampler}", *trials, f"--pruner={self.pruner}"]


def prepare_sweep(
    run: Run,
    content: dict[str, Any],
    request: SweepRequest,
    worker: CommandWorker,
    settings: Settings,
) -> None:
    """Checks what is tried in a checked recipe, by the command line, and writes it into a folder.

    Raises UserError with all values that are wrong.
    """
    if "ProgressBar" not in dump_yaml(content):
        content = with_value(content, "trainer.enable_progress_bar", False)
    if value_at(content, _SKIPPED, None) is not None:
        content = with_value(content, _SKIPPED, str(skipped_rows_file(run.folder)))
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        # Trials are called like the file.
        words = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:40]
        recipe = Path(folder) / f"{words or 'sweep'}.yaml"
        recipe.write_text(dump_yaml(content), encoding="utf-8")
        given = [str(recipe), *request.words(), f"--folder={run.folder.path}", "--prepare"]
        answer = worker.run(["sweep", *given], _SECONDS)
    if answer.code != 0:
        reason = shortened(error_message(answer) or "-", 600)
        raise UserError("new.sweep_refused", reason=reason)
    # It was checked in a folder of the page, and is trained in another.
    place = str(LocalExecutor.directory(settings, run.folder.path))
    prepared = read_json_object(run.folder.sweep)
    write_json(run.folder.sweep, {**prepared, "directory": place})


@dataclass(frozen=True)
class Trial:
    """A trial: its number, state, values by name, metric, steps, seconds, error and run."""

    number: int
    state: str
    values: dict[str, Any]
    metric: float | None
    steps: int | None
    seconds: float | None
    error: str
    run: str


@dataclass(frozen=True)
class Trials:
    """The trials of a sweep, by what they are judged, and the number of the best one."""

    rows: Sequence[Trial]
    metric: str
    mode: str
    best: int | None


def trials_of(run: Run) -> Trials:
    """Returns the trials that a sweep has begun, as it has written them down."""
    content = read_json_object(run.folder.trials)
    metric = str(content.get("metric", ""))
    rows = content.get("trials")
    trials = [_trial(row, metric, run) for row in rows or () if isinstance(row, dict)]
    best = content.get("best")
    found = best.get("trial") if isinstance(best, dict) else None
    return Trials(trials, metric, str(content.get("mode", "min")), found)


def _trial(row: dict[str, Any], metric: str, run: Run) -> Trial:
    value, steps = number(row.get(metric)), number(row.get("steps"))
    values = row.get("values")
    return Trial(
        int(number(row.get("trial")) or 0),
        str(row.get("state")),
        {shortened(name): one for name, one in values.items()} if isinstance(values, dict) else {},
        value if value is not None and math.isfinite(value) else None,
        None if steps is None else int(steps),
        number(row.get("seconds")),
        run.redactor.text(str(row.get("error") or "")),
        Path(str(row.get("run"))).name,
    )

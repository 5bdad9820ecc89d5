"""Training preview of some rows through ``lightning-peft preview``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import redacted
from gradio_app.recipe.command_worker import CommandResult, CommandWorker
from gradio_app.recipe.content import data_of, is_series, value_at, with_value
from gradio_app.recipe.table import Table, first_rows
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.redaction import bundled_folders

SAMPLE_ROWS = 5
# Every row is read and turned into tokens; a shared machine has less time for one visitor.
SECONDS = 900.0
SPACE_SECONDS = 90.0
PARSER_SECONDS = 120.0


@dataclass(frozen=True)
class DataReport:
    """What is known of some rows: the numbers of ``preview --json``, and the first rows of a file.

    Without numbers, ``refusal`` is the message of the command. ``skipping``: whether rows with
    problems are left out, ``step`` is the step of the form that solves the refusal, and
    ``cancelled`` that the report was no longer needed.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    table: Table | None = None
    refusal: str = ""
    skipping: bool = False
    step: str = "data"
    cancelled: bool = False

    @property
    def problems(self) -> list[dict[str, Any]]:
        """What is wrong with rows, by kind."""
        return list(self.numbers.get("problems", []))

    @property
    def ok(self) -> bool:
        """Whether a run can be started with them."""
        usable = self.numbers.get("splits", {}).get("train", {}).get("rows", 1) > 0
        return bool(self.numbers) and usable and (self.skipping or not self.problems)

    @property
    def needs_column_names(self) -> bool:
        """Whether only which column is which has to be said."""
        return "ay which column is which" in self.refusal and self.table is not None

    @property
    def columns(self) -> list[str]:
        """Names of the columns that a field can be read from."""
        known = [*self.numbers.get("columns", {}).values(), *self.numbers.get("columns_unused", [])]
        return list(dict.fromkeys([*(self.table.columns if self.table else []), *map(str, known)]))

    @property
    def longest(self) -> int | None:
        """Tokens of the longest training row, where rows have tokens."""
        found = self.numbers.get("lengths", {}).get("longest")
        return int(found) if found else None


def preview_data(
    content: dict[str, Any],
    worker: CommandWorker,
    space: bool,
    still_needed: Callable[[], bool] | None = None,
    on_rows: Callable[[int], None] | None = None,
    search: str = "",
) -> DataReport:
    """Returns the preview of training on the rows of a checked recipe.

    ``still_needed`` is polled, and ``on_rows`` is called with the number of rows read so far. With
    ``search``, the rows that are shown are those in which that text occurs.
    """
    place = data_of(content)
    skipping = value_at(content, "data.init_args.skip_bad_rows", None)
    table = first_rows(local_path(place), content)
    if is_series(content):
        # The run checks it before its first step.
        return DataReport({"series": True} if table else {}, table)
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        if skipping is not None:
            # The file is the run's; this only shows what it would contain.
            skipped_rows_file = str(Path(folder) / "left-out.jsonl")
            content = with_value(content, "data.init_args.skip_bad_rows", skipped_rows_file)
        words = ["preview", "--json", f"--rows={SAMPLE_ROWS}"]
        words += [f"--search={search}"] if search else []
        words += [_config(folder, {"data": content["data"]})]
        answer = worker.run(words, SPACE_SECONDS if space else SECONDS, still_needed, on_rows)
    if answer.cancelled:
        return DataReport(table=table, cancelled=True)
    numbers = answer.json() if answer.code in (0, 1) else None
    if numbers is None:
        return DataReport(table=table, refusal=error_message(answer), skipping=skipping is not None)
    # Of the rows themselves nothing is changed.
    redacted_rows = {
        "problems": worker.redactor.value(numbers.get("problems", []), worker.redactor.record)
    }
    return DataReport(numbers | redacted_rows, table, skipping=skipping is not None)


def search_rows(
    content: dict[str, Any], worker: CommandWorker, space: bool, text: str
) -> DataReport:
    """Returns the preview of a checked recipe with the rows in which ``text`` occurs.

    Raises UserError where there are none to search.
    """
    found = preview_data(content, worker, space, search=text)
    if "search" not in found.numbers:
        raise UserError("checks.search_refused", reason=found.refusal or "-")
    return found


def _config(folder: str, content: dict[str, Any]) -> str:
    file = Path(folder) / "recipe.yaml"
    file.write_text(dump_yaml(content), encoding="utf-8")
    return f"--config={file}"


def parser_error(
    content: dict[str, Any], worker: CommandWorker, still_needed: Callable[[], bool] | None = None
) -> str:
    """Returns the error of ``lightning-peft fit`` for a checked recipe; empty if there is none.

    Its own parser knows every argument. Nothing is made and nothing is loaded.
    """
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        words = ["fit", _config(folder, content), "--print_config"]
        answer = worker.run(words, PARSER_SECONDS, still_needed)
    return "" if answer.code == 0 else error_message(answer) or "-"


def local_path(place: str) -> Path:
    """Returns where the rows of a checked recipe lie, if they lie on this machine."""
    for mark, folder in bundled_folders().items():
        if place.startswith(mark):
            return folder / place.removeprefix(mark)
    return Path(place)


def error_message(answer: CommandResult) -> str:
    """Returns the last thing that a command said of what went wrong."""
    text = redacted(answer.err)
    place = text.rfind("lightning-peft: ")
    found = text[place:].removeprefix("lightning-peft: ") if place >= 0 else text[-600:]
    return found.strip()

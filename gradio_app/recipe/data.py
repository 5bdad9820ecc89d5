"""What training on some rows would be like: ``lightning-peft preview`` of a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_app.guards import redacted
from gradio_app.public import bundled_folders
from gradio_app.recipe.content import data_of, value_at, with_value
from gradio_app.recipe.parsing import dumped
from gradio_app.recipe.rows import Table, first_rows
from gradio_app.recipe.warm import Completed, WarmCommands

SHOWN = 5
# Every row is read and turned into tokens; a shared machine has less time for one visitor.
SECONDS = 900.0
SECONDS_HERE = 90.0


@dataclass(frozen=True)
class DataReport:
    """What is known of some rows.

    Attributes:
        numbers: What ``preview --json`` printed; empty where it could not be said.
        table: The first rows as they stand in the file, where it is one of this machine.
        refusal: Why nothing could be said, in the words of the command.
        skipping: Whether rows with problems are left out.
        step: Step of the form in which the refusal can be solved.
        unwanted: Whether nobody waits for it any more.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    table: Table | None = None
    refusal: str = ""
    skipping: bool = False
    step: str = "data"
    unwanted: bool = False

    @property
    def problems(self) -> list[dict[str, Any]]:
        """What is wrong with rows, by kind."""
        return list(self.numbers.get("problems", []))

    @property
    def fine(self) -> bool:
        """Whether a run can be started with them."""
        usable = self.numbers.get("splits", {}).get("train", {}).get("rows", 1) > 0
        return bool(self.numbers) and usable and (self.skipping or not self.problems)

    @property
    def columns_unknown(self) -> bool:
        """Whether only which column is which has to be said."""
        return "Say which column is which" in self.refusal and self.table is not None

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


def looked_at(
    content: dict[str, Any],
    warm: WarmCommands,
    space: bool,
    wanted: Callable[[], bool] | None = None,
    heard: Callable[[int], None] | None = None,
) -> DataReport:
    """Returns what training on the rows of a recipe would be like.

    Args:
        content: A recipe that has been checked.
        warm: What runs the command.
        space: Whether strangers ask.
        wanted: Says whether the answer is still wanted.
        heard: Is given how many rows have been read, again and again.
    """
    place = data_of(content)
    skipping = value_at(content, "data.init_args.skip_bad_rows", None)
    table = first_rows(local(place), content)
    if value_at(content, "data.class_path", "").endswith("SeriesData"):
        # A table of numbers is no rows of examples; the run checks it before its first step.
        return DataReport({"series": True} if table else {}, table)
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        file = Path(folder) / "recipe.yaml"
        if skipping is not None:
            # The file is the run's; here it is only asked what would be in it.
            left_out = str(Path(folder) / "left-out.jsonl")
            content = with_value(content, "data.init_args.skip_bad_rows", left_out)
        file.write_text(dumped({"data": content["data"]}), encoding="utf-8")
        words = ["preview", "--json", f"--rows={SHOWN}", f"--config={file}"]
        answer = warm.run(words, SECONDS_HERE if space else SECONDS, wanted, heard)
    if answer.unwanted:
        return DataReport(table=table, unwanted=True)
    numbers = answer.json() if answer.code in (0, 1) else None
    if numbers is None:
        return DataReport(table=table, refusal=said(answer), skipping=skipping is not None)
    # Of the rows themselves nothing is changed.
    told = {"problems": warm.public.value(numbers.get("problems", []), warm.public.record)}
    return DataReport(numbers | told, table, skipping=skipping is not None)


def local(place: str) -> Path:
    """Returns where the rows of a checked recipe lie, if they lie on this machine."""
    for mark, folder in bundled_folders().items():
        if place.startswith(mark):
            return folder / place.removeprefix(mark)
    return Path(place)


def said(answer: Completed) -> str:
    """Returns the last thing that a command said of what went wrong."""
    text = redacted(answer.err)
    place = text.rfind("lightning-peft: ")
    found = text[place:].removeprefix("lightning-peft: ") if place >= 0 else text[-600:]
    return found.strip()

"""``lightning-peft preview``: what a model would be trained on, without training."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import LightningPeftError

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_peft.data.preview import Preview, PreviewedRow

ABOUT = "Show which tokens of your data are trained, and all that is wrong with its rows."
_MORE = (
    "exit code: 0 if every row can be trained on (or the others are skipped), 1 if rows have "
    "problems, 2 for bad input"
)
# What only concerns the order and loading of batches.
_OF_TRAINING = {"shuffle_seed", "num_workers", "length_grouping", "packing"}
_BAR = 40


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 if all is well, 1 if rows have problems, 2 if the input cannot be used.
    """
    jsonargparse = import_module("jsonargparse")
    parser = jsonargparse.ArgumentParser(
        prog="lightning-peft preview", description=f"{ABOUT}\n\n{_MORE}"
    )
    parser.add_argument("--config", action="config", help="YAML file with these arguments.")
    parser.add_argument("--rows", type=int, default=3, help="Rows that are shown by token.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    made = import_module("lightning_peft.data.supervised").SupervisedData
    parser.add_class_arguments(made, skip=_OF_TRAINING)
    given = parser.parse_args([_underscored(word) for word in arguments]).as_dict()
    rows, as_json = given.pop("rows"), given.pop("json")
    given.pop("config", None)
    try:
        # Whatever libraries print, the result alone goes to the standard output.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            data = made(**given)
            shown = import_module("lightning_peft.data.preview").preview(data, rows)
            if shown.numbers["problems"] and given["skip_bad_rows"]:
                data.setup("fit")
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 2
    if as_json:
        content = {**shown.numbers, "first_rows": [asdict(row) for row in shown.rows]}
        print(json.dumps(content, indent=2))
    else:
        _show(import_module("rich.console").Console(highlight=False), shown)
    return 1 if shown.numbers["problems"] and not given["skip_bad_rows"] else 0


def _underscored(word: str) -> str:
    # The options are Python arguments; --skip-bad-rows is how a command line spells them.
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if _option(word) else word


def _option(word: str) -> bool:
    return word.startswith("--") and word != "--"


def _show(console: Console, shown: Preview) -> None:
    numbers = shown.numbers
    for line in _overview(numbers):
        console.print(line, markup=False, soft_wrap=True)
    for row in shown.rows:
        _show_row(console, row)
    _show_lengths(console, numbers)
    for problem in numbers["problems"]:
        _show_problem(console, problem)
    if numbers["problems"]:
        text = f"{numbers['rejected']:,} of {numbers['rows']:,} rows have problems."
        console.print(text, style="bold red")
    else:
        console.print(f"All {numbers['rows']:,} rows can be trained on.", style="green")


def _overview(numbers: dict[str, Any]) -> list[str]:
    columns = ", ".join(
        ours if ours == theirs else f"{ours} from {theirs!r}"
        for ours, theirs in numbers["columns"].items()
    )
    template = numbers["template"]
    by = numbers["split_by"]
    how = by["by"] if by["by"] != "content" else f"by content, seed {by['seed']}"
    counts = ", ".join(
        f"{name} {split['rows']:,}" for name, split in numbers["splits"].items() if split["rows"]
    )
    train = numbers["splits"]["train"]
    lines = [
        f"shape     {numbers['shape']['title']} ({columns})",
        f"template  {template['name'] if template else 'none: plain text'}",
        f"splits    {counts or 'no rows'} ({how})",
        f"trained   {train['trained_tokens']:,} of {train['tokens']:,} tokens "
        f"({numbers['trained_share']:.1%}); the end token in {train['ends_trained']:,} of "
        f"{train['rows']:,} rows",
    ]
    if numbers["columns_unused"]:
        lines.append(f"not read  columns {', '.join(numbers['columns_unused'])}")
    if numbers["files_left_out"]:
        lines.append(f"not read  files {', '.join(numbers['files_left_out'])}")
    if train["ends_added"]:
        lines.append(
            f"note      the end token was added to {train['ends_added']:,} rows: what is written "
            "ends without one"
        )
    if train["duplicates"]:
        lines.append(f"note      {train['duplicates']:,} duplicates are kept")
    if numbers["shared_prompts"]:
        lines.append(
            f"note      {numbers['shared_prompts']:,} prompts are in two splits with other answers"
        )
    return lines


def _show_row(console: Console, row: PreviewedRow) -> None:
    made = import_module("rich.text").Text
    title = f"\n{row.split}: {row.file} row {row.row}"
    if console.is_terminal:
        console.print(f"{title} (trained, not trained)", markup=False, style="bold")
        text = made()
        for run in row.runs:
            text.append(run.text, style="bold green" if run.trained else "dim")
        console.print(text)
        return
    # Without colour, a mark before each line says it, as in a patch.
    print(f"{title} (+ trained, | not trained)")
    for run in row.runs:
        for line in run.text.split("\n"):
            print(f"  {'+' if run.trained else '|'} {line}")


def _show_lengths(console: Console, numbers: dict[str, Any]) -> None:
    lengths, packing = numbers["lengths"], numbers["packing"]
    train = numbers["splits"]["train"]
    if not lengths["buckets"]:
        return
    console.print(
        f"\ntokens per row: {lengths['mean']:,} on average, {lengths['longest']:,} at most, "
        f"{numbers['max_length']:,} allowed"
    )
    most = max(bucket["rows"] for bucket in lengths["buckets"])
    for bucket in lengths["buckets"]:
        bar = "#" * -(-_BAR * bucket["rows"] // most)
        console.print(f"  {bucket['from']:>6,}-{bucket['to']:<6,} {bucket['rows']:>7,} {bar}")
    console.print(
        f"truncated: {train['truncated']:,} rows, {train['tokens_cut']:,} tokens cut off\n"
        f"packing: {train['rows']:,} rows into {packing['rows']:,}, "
        f"{packing['efficiency']:.1%} full; padded batches are "
        f"{packing['efficiency_of_padding']:.1%} full",
        soft_wrap=True,
    )


def _show_problem(console: Console, problem: dict[str, Any]) -> None:
    rows = problem["rows"]
    console.print(f"\n{problem['title']}: {len(rows):,}", style="bold red", markup=False)
    for row in rows[:12]:
        line = f"  {row['file']} row {row['row']} {row['detail']}"
        console.print(line, markup=False, soft_wrap=True)
    if len(rows) > 12:
        console.print(f"  all rows: {problem['numbers']}", markup=False, soft_wrap=True)
    console.print(f"  What to do: {problem['what_to_do']}.", markup=False, soft_wrap=True)

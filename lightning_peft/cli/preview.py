"""``lightning-peft preview``: show the training rows and tokens without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.data_config import data_from_config
from lightning_peft.cli.options import OptionParser, add_config_option, command_parser
from lightning_peft.cli.output import print_json, to_stderr

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_peft.data.preview import Preview, PreviewedRow

ABOUT = "Show which tokens of your data are trained, and all that is wrong with its rows."
_MORE = """\
--data FILE            what to look at: a file, a folder, or a dataset on the hub
--tokenizer NAME       on the hub, or a folder
--chat-template NAME   chatml, plain, raw, or Jinja source
--columns JSON         such as '{"prompt": "question", "completion": "answer"}'
--skip-bad-rows FILE   write rows with problems there, with the reasons
--search TEXT          show the first rows in which this text occurs, of any split

These and all others are the arguments of lightning_peft.SupervisedData; --help-all lists them. With
--config, they are those of the data module of that recipe: lightning-peft preview --config dpo-lora
--data pairs.jsonl.

exit code: 0 if every row can be trained on (or the others are skipped), 1 if rows have problems, 2
for bad input
"""
_BAR = 40
# Labels, roles and languages that are listed with their rows.
_LABELS = 12
# Files that are listed with how they are read.
_FILES = 12


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(list(arguments))
    with to_stderr(args.json):
        from lightning_peft.data.preview import preview

        words = ["--help", *rest] if args.help_all else rest
        data = data_from_config(args.config, words, options=parser.known())
        shown = preview(data, args.rows, args.search)
        skipping = data.hparams["skip_bad_rows"] is not None
        if shown.numbers["problems"] and skipping:
            data.setup("fit")
    if args.json:
        print_json({**shown.numbers, "first_rows": [asdict(row) for row in shown.rows]})
    else:
        from rich.console import Console

        _show(Console(highlight=False), shown)
    return 1 if shown.numbers["problems"] and not skipping else 0


def _parser() -> OptionParser:
    parser = command_parser("preview", ABOUT, _MORE)
    add_config_option(parser)
    parser.add_argument("--rows", type=int, default=3, help="rows that are shown in full")
    parser.add_argument(
        "--search", default="", metavar="TEXT", help="show rows in which this text occurs"
    )
    parser.add_argument("--help-all", action="store_true", help="list all arguments of the data")
    return parser


def _show(console: Console, shown: Preview) -> None:
    numbers = shown.numbers
    for line in overview(numbers):
        console.print(line, markup=False, soft_wrap=True)
    if "search" in numbers:
        search = numbers["search"]
        line = f"\n{search['text']!r} occurs in {search['rows']:,} rows"
        console.print(line, markup=False, soft_wrap=True)
    for row in shown.rows:
        _show_row(console, row)
    if "lengths" in numbers:
        _show_lengths(console, numbers)
    show_problems(console, numbers)


def show_problems(console: Console, numbers: dict[str, Any]) -> None:
    """Prints all problems, or that there are none."""
    for problem in numbers["problems"]:
        _show_problem(console, problem)
    if numbers["problems"]:
        text = f"{numbers['rejected']:,} of {numbers['rows']:,} rows have problems."
        console.print(text, style="bold red")
    else:
        console.print(f"All {numbers['rows']:,} rows can be trained on.", style="green")


def overview(numbers: dict[str, Any]) -> list[str]:
    """Returns the lines on all of the data: shape, splits, how files are read, what is not used."""
    columns = ", ".join(
        ours if ours == theirs else f"{ours} from {theirs!r}"
        for ours, theirs in numbers["columns"].items()
    )
    by = numbers["split_by"]
    how = by["by"] if by["by"] != "content" else f"by content, seed {by['seed']}"
    counts = ", ".join(
        f"{name} {split['rows']:,}" for name, split in numbers["splits"].items() if split["rows"]
    )
    lines = [f"shape     {numbers['shape']['title']} ({columns})"]
    if "template" in numbers:
        template = numbers["template"]
        lines.append(f"template  {template['name'] if template else 'none: plain text'}")
    lines.append(f"splits    {counts or 'no rows'} ({how})")
    if "labels" in numbers:
        lines.append(f"labels    {', '.join(map(str, numbers['labels']))}")
    read = [f"{file['file']}: {file['words']}" for file in numbers["read_as"]]
    lines += [f"read as   {words}" for words in read[:_FILES]]
    if len(read) > _FILES:
        lines.append(f"read as   ... and {len(read) - _FILES:,} more files (--json lists them)")
    return [*lines, *_content(numbers.get("statistics", {})), *_counted(numbers)]


def _content(found: dict[str, Any]) -> list[str]:
    lines = []
    if turns := found.get("turns"):
        between = f"{turns['least']} to {turns['most']} turns, {turns['mean']} on average"
        lines.append(
            f"turns     {turns['conversations']:,} conversations of {between} "
            f"({_counts(turns['roles'])})"
        )
    for name, title in (("writing", "writing"), ("languages", "languages")):
        if found.get(name):
            lines.append(f"{title:<9} {_counts(found[name])}")
    for split, counts in found.get("label_counts", {}).items():
        lines.append(f"{split:<9} {_counts(counts)}".rstrip())
    return lines


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_LABELS]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _counted(numbers: dict[str, Any]) -> list[str]:
    train = numbers["splits"]["train"]
    lines = []
    if "trained_share" in numbers:
        line = (
            f"trained   {train['trained_tokens']:,} of {train['tokens']:,} tokens "
            f"({numbers['trained_share']:.1%})"
        )
        if "ends_trained" in train:
            what = "answers" if "answers" in train else "rows"
            line += f"; the end token in {train['ends_trained']:,} of {train[what]:,} {what}"
        lines.append(line)
    for key in numbers["keys_unused"]:
        where = "; ".join(
            f"rows {rows}" + (f" of {file}" if len(key["rows"]) > 1 else "")
            for file, rows in key["rows"].items()
        )
        lines.append(f"not used  {key['key']} ({where})")
    if numbers["files_left_out"]:
        lines.append(f"not read  files {', '.join(numbers['files_left_out'])}")
    if train.get("ends_added"):
        lines.append(
            f"note      the end token was added to {train['ends_added']:,} rows: what is written "
            "ends without one"
        )
    if train.get("further_parts"):
        lines.append(
            f"note      {train['further_parts']:,} rows are further parts of others: pieces of a "
            "long text, or answers that the template requests with other turns before them"
        )
    if train["duplicates"]:
        lines.append(f"note      {train['duplicates']:,} duplicates are kept")
    about = numbers["statistics"]
    if near := about["near_duplicates"]:
        several = len(numbers["read_as"]) > 1
        rows = ", ".join(
            f"{one['row']} of {one['file']} as {one['like_row']} of {one['like_file']}"
            if several
            else f"{one['row']} as {one['like_row']}"
            for one in about["near_duplicate_rows"]
        )
        lines.append(f"note      {near:,} near duplicates, such as row {rows}")
    if numbers["shared_prompts"]:
        lines.append(
            f"note      {numbers['shared_prompts']:,} prompts are in two splits with other answers"
        )
    return lines


def _show_row(console: Console, row: PreviewedRow) -> None:
    from rich.text import Text

    title = f"\n{row.split}: {row.file} row {row.row}"
    if console.is_terminal:
        console.print(f"{title} (trained, not trained)", markup=False, style="bold")
        text = Text()
        for span in row.runs:
            text.append(span.text, style="bold green" if span.trained else "dim")
        console.print(text)
        return
    # Without colour, a mark before each line says it, as in a patch.
    print(f"{title} (+ trained, | not trained)")
    for span in row.runs:
        for line in span.text.split("\n"):
            print(f"  {'+' if span.trained else '|'} {line}")


def _show_lengths(console: Console, numbers: dict[str, Any]) -> None:
    lengths, train = numbers["lengths"], numbers["splits"]["train"]
    console.print(
        f"\nlength per row: {lengths['mean']:,} on average, {lengths['median']:,} in the middle, "
        f"{lengths['longest']:,} at most, {numbers['max_length']:,} allowed",
        soft_wrap=True,
    )
    most = max(bucket["rows"] for bucket in lengths["buckets"])
    for bucket in lengths["buckets"]:
        bar = "#" * -(-_BAR * bucket["rows"] // most)
        cut = " cut" if bucket["cut"] else ""
        console.print(f"  {bucket['from']:>6,}-{bucket['to']:<6,} {bucket['rows']:>7,} {bar}{cut}")
    longest = numbers["statistics"]["longest_rows"]
    if longest:
        rows = ", ".join(f"{one['row']:,} ({one['length']:,})" for one in longest)
        console.print(f"longest rows: {rows}", soft_wrap=True)
    if "truncated" in train:
        cut = train.get("tokens_cut", 0)
        console.print(f"truncated: {train['truncated']:,} rows, {cut:,} tokens cut off")
    padded = f"padded batches are {numbers['padding']['efficiency']:.1%} full"
    if "packing" in numbers:
        packing = numbers["packing"]
        padded = (
            f"packing: {train['rows']:,} rows into {packing['rows']:,}, "
            f"{packing['efficiency']:.1%} full; {padded}"
        )
    console.print(padded, soft_wrap=True)


def _show_problem(console: Console, problem: dict[str, Any]) -> None:
    rows = problem["rows"]
    console.print(f"\n{problem['title']}: {len(rows):,}", style="bold red", markup=False)
    for row in rows[:12]:
        line = f"  {row['file']} row {row['row']} {row['detail']}"
        console.print(line, markup=False, soft_wrap=True)
    if len(rows) > 12:
        console.print(f"  all rows: {problem['numbers']}", markup=False, soft_wrap=True)
    console.print(f"  What to do: {problem['what_to_do']}.", markup=False, soft_wrap=True)

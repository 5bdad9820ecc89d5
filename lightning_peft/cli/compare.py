"""``lightning-peft compare``: the base against its adapters, on prompts or data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_peft.cli.chat import add_model_options, load_chat_model
from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_report, progress_to_stderr
from lightning_peft.errors import ConfigError
from lightning_peft.file_errors import new_file_problem

ABOUT = "Compare a base with its adapters: answers side by side, or losses on data."
_MORE = """\
ADAPTER is an adapter folder, a .ckpt file, or the folder of a run; NAME=PATH names it. One model
is loaded; the base is that model with its adapters switched off.

exit code: 0 at the end, 1 if the adapters cannot be loaded, 2 for bad input, 130 if interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    print_report(_parser().parse_args(arguments), _compare, _show)
    return 0


def _parser() -> OptionParser:
    parser = command_parser("compare", ABOUT, _MORE)
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+")
    on = parser.add_mutually_exclusive_group(required=True)
    on.add_argument("--prompts", help="text file, one a line, or JSONL with prompt and reference")
    on.add_argument(
        "--held-out",
        action="store_true",
        help="the validation rows that the run of the first adapter kept",
    )
    on.add_argument("--data", help="data as for SupervisedData: losses instead of answers")
    add_model_options(parser)
    data = parser.add_argument_group("with --data")
    data.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        default="validation",
        help="which rows; drawn as in training with the same data",
    )
    data.add_argument("--columns", nargs="+", metavar="OURS=THEIRS", help="names of columns")
    data.add_argument("--validation-share", type=float)
    data.add_argument("--split-seed", type=int, default=0)
    data.add_argument("--max-length", type=int)
    data.add_argument("--limit", type=int, help="most rows that are read, also of --held-out")
    data.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", help="JSONL file to make, with a line for each prompt or row")
    return parser


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from lightning_peft.chat import comparison
    from lightning_peft.chat.answer_scores import summarize_rows

    problem = new_file_problem(args.output) if args.output else None
    if problem:
        raise ConfigError(f"--output {args.output!r}{problem}.")
    prompts = comparison.read_prompts(args.prompts) if args.prompts else None
    if args.held_out:
        prompts = comparison.held_out_prompts(_first_folder(args.adapters), args.limit)
    columns = _columns(args.columns)
    if args.data and args.tools:
        raise ConfigError("--tools is for --prompts; rows of --data bring their own tools.")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: at least 1.")
    if args.data and not Path(args.data).exists() and "/" not in args.data:
        raise ConfigError(f"--data {args.data!r} is not a file or folder here.")
    chat_model = load_chat_model(args)
    with progress_to_stderr() as progress:
        if prompts is not None:
            rows = []
            for row in comparison.answers(chat_model, prompts, args.system, progress):
                rows.append(row)
                # At once: what is there survives an interrupt.
                _append(args.output, [row])
            found = summarize_rows(rows)
            summary = {name: asdict(one) for name, one in found.items()}
            return {"compared": chat_model.names, "answers": rows, "summary": summary}
        scores = comparison.scores(
            chat_model, _data(args, chat_model, columns), args.split, progress
        )
    _append(args.output, _by_row(scores))
    return {
        "compared": chat_model.names,
        "data": args.data,
        "split": args.split,
        "rows": len(scores[0].rows),
        "scores": [score.as_dict() for score in scores],
    }


def _first_folder(adapters: Sequence[str]) -> Path:
    from lightning_peft.export.adapters import find_adapter

    return find_adapter(adapters[0]).folder


def _columns(options: list[str] | None) -> dict[str, str] | None:
    pairs = [option.partition("=") for option in options or []]
    bad = [name for name, equals, column in pairs if not (equals and column)]
    if bad:
        raise ConfigError(f"--columns {' '.join(bad)}: write OURS=THEIRS, as in prompt=question.")
    return {name: column for name, _, column in pairs} or None


def _data(args: argparse.Namespace, chat_model: Any, columns: dict[str, str] | None) -> Any:
    from lightning_peft.data.supervised import SupervisedData

    first = chat_model.prompted_as
    return SupervisedData(
        data=args.data,
        tokenizer=chat_model.loaded.tokenizer.name_or_path,
        columns=columns,
        chat_template=chat_model.chat_template_override or (first and first.chat_template),
        system_prompt=args.system,
        # As in training, or what is compared would be other tokens.
        reasoning=chat_model.recorded("reasoning", "train"),
        chat_template_kwargs=chat_model.variables() or None,
        validation_share=args.validation_share,
        split_seed=args.split_seed,
        max_length=args.max_length,
        limit=args.limit,
        batch_size=args.batch_size,
    )


def _by_row(scores: list[Any]) -> list[dict[str, Any]]:
    return [
        {"row": number, "tokens": scores[0].rows[number]["tokens"]}
        | {
            score.name: {key: score.rows[number][key] for key in ("loss", "hits")}
            for score in scores
        }
        for number in range(len(scores[0].rows))
    ]


def _append(file: str | None, rows: list[dict[str, Any]]) -> None:
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if "scores" in report:
        _show_scores(report)
        return
    if not console.is_terminal:
        for row in report["answers"]:
            print(f"prompt     {row['prompt']}")
            if "reference" in row:
                print(f"reference  {row['reference']}")
            for name, answer in row["answers"].items():
                print(f"{name:<10} {answer}")
            print()
        _show_summary(report["summary"])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    reference = any("reference" in row for row in report["answers"])
    for heading in ["prompt", *(["reference"] if reference else []), *report["compared"]]:
        table.add_column(escape(heading))
    for row in report["answers"]:
        more = [row.get("reference", "")] if reference else []
        table.add_row(*(escape(x) for x in (row["prompt"], *more, *row["answers"].values())))
    console.print(table)
    _show_summary(report["summary"])


def _show_summary(summary: dict[str, Any]) -> None:
    if not summary:
        return
    width = max(map(len, summary)) + 2
    rows = next(iter(summary.values()))["rows"]
    print(f"{f'{rows:,} rows':<{width}}{'exact match':>13}{'valid JSON':>14}{'token overlap':>15}")
    for name, one in summary.items():
        valid = f"{one['valid_json']:,} of {one['json_rows']:,}" if one["json_rows"] else "-"
        overlap = f"{one['token_overlap']:.1%}"
        print(f"{name:<{width}}{one['exact']:>13,}{valid:>14}{overlap:>15}")


def _show_scores(report: dict[str, Any]) -> None:
    scores = report["scores"]
    data, split, tokens = report["data"], report["split"], scores[0]["tokens"]
    print(f"{data}, {split}: {report['rows']:,} rows, {tokens:,} tokens")
    width = max(len(score["name"]) for score in scores) + 2
    print(f"{'':<{width}}{'loss/token':>12}{'change':>10}{'perplexity':>12}{'token accuracy':>16}")
    for score in scores:
        change = f"{score['loss'] - scores[0]['loss']:+.4f}" if score is not scores[0] else ""
        print(
            f"{score['name']:<{width}}{score['loss']:>12.4f}{change:>10}"
            f"{score['perplexity']:>12.3f}{score['token_accuracy']:>16.1%}"
        )

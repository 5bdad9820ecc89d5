"""``lightning-peft evaluate``: lm-evaluation-harness benchmarks, base against adapters."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.chat import (
    add_loading_options,
    check_template,
    find_model,
    load_model,
    show_memory,
)
from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_report, progress_to_stderr, quiet_libraries
from lightning_peft.errors import ConfigError
from lightning_peft.file_errors import new_file_problem

if TYPE_CHECKING:
    from lightning_peft.evaluation.evaluating import Settings

ABOUT = "Evaluate a base and its adapters on tasks of EleutherAI's lm-evaluation-harness."
_MORE = """\
ADAPTER is an adapter folder, a .ckpt file, or the folder of a run; NAME=PATH names it. One model
is loaded; the base is that model with its adapters switched off. The results of a run are kept in
its folder, in evaluations/.

Tasks with local files need no network: small_opposites and small_iso_dates come with this package,
others are read from --include-path. A task's file can run Python code: take those that you trust.

exit code: 0 at the end, 1 if the adapters cannot be loaded or a file of results cannot be written,
2 for bad input, 130 if interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    report = print_report(_parser().parse_args(arguments), _evaluate, _show)
    return int(bool(report["not_saved"]))


def _parser() -> OptionParser:
    parser = command_parser("evaluate", ABOUT, _MORE)
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="tasks, groups or tags"
    )
    parser.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="FOLDER",
        help="with tasks as YAML files and their rows; repeatable",
    )
    parser.add_argument(
        "--batch-size",
        default="auto",
        metavar="N",
        help="requests at a time; auto takes the most that fit on a GPU, 8 on a CPU",
    )
    parser.add_argument(
        "--limit", type=float, metavar="N", help="first rows of each task, or a share below 1"
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each question"
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="write the questions as turns of a conversation",
    )
    parser.add_argument("--seed", type=int, help="of everything drawn; by default the harness' own")
    add_loading_options(parser)
    parser.add_argument("--output", metavar="FILE", help="JSON file to make with the results")
    return parser


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    # The harness' own bars, which would write between those of this command.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from lightning_peft.evaluation.harness_package import harness_version

    harness_version()
    names = [name for word in args.tasks for name in word.split(",") if name]
    _check(args, names)
    quiet_libraries()
    from lightning_peft.chat.chat_model import ChatModel
    from lightning_peft.chat.template_inputs import read_variables
    from lightning_peft.evaluation import evaluating
    from lightning_peft.evaluation.results import save
    from lightning_peft.evaluation.tasks import load_tasks

    variables = read_variables(args.chat_template_kwargs)
    base, adapters = find_model(args)
    evaluating.check_language_model(base, adapters)
    if args.apply_chat_template:
        check_template(args, base, adapters)
    settings = _settings(args)
    with progress_to_stderr() as progress:
        progress("reading the tasks", 0, 1)
        tasks = load_tasks(
            names, args.include_path, num_fewshot=args.num_fewshot, seeds=settings.seeds
        )
        progress("reading the tasks", 1, 1)
        loaded = load_model(args, base, adapters)
        model = ChatModel(loaded, adapters, args.chat_template, variables_override=variables)
        show_memory(model)
        report: dict[str, Any] = evaluating.evaluate(model, tasks, settings, progress)
    report["bits"] = args.bits or (adapters[0].bits if adapters else 16)
    saved, not_saved = save(report, [adapter.folder for adapter in adapters], args.output)
    for note in [*report["notes"][len(loaded.notes) :], *not_saved]:
        print(f"note: {note}", file=sys.stderr)
    return report | {"saved": [str(file) for file in saved], "not_saved": not_saved}


def _check(args: argparse.Namespace, names: list[str]) -> None:
    problems = []
    if not names:
        problems.append("--tasks names none")
    if not args.adapters and not args.base:
        problems.append("neither an ADAPTER nor --base is given")
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size)):
        problems.append(f"--batch-size {args.batch_size}: auto, or at least 1")
    if args.limit is not None and not (0 < args.limit < 1 or args.limit == args.limit // 1 >= 1):
        problems.append(f"--limit {args.limit:g}: rows from 1, or a share between 0 and 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        problems.append(f"--num-fewshot {args.num_fewshot}: 0 or more")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        problems.append(f"--seed {args.seed}: from 0 to {2**32 - 1}, as NumPy takes it")
    for name in ("chat_template", "chat_template_kwargs"):
        if getattr(args, name) and not args.apply_chat_template:
            option = f"--{name.replace('_', '-')}"
            problems.append(f"{option} has no effect without --apply-chat-template")
    # Now, and not after hours of evaluation.
    problem = new_file_problem(args.output) if args.output else None
    problems += [f"--output {args.output!r}{problem}"] if problem else []
    if problems:
        raise ConfigError("; ".join(problems))


def _settings(args: argparse.Namespace) -> Settings:
    from lightning_peft.evaluation.evaluating import Settings
    from lightning_peft.evaluation.tasks import HARNESS_SEEDS, Seeds

    return Settings(
        batch_size=None if args.batch_size == "auto" else int(args.batch_size),
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
        system=args.system,
        seeds=HARNESS_SEEDS if args.seed is None else Seeds(*[args.seed] * 4),
    )


def _show(report: dict[str, Any]) -> None:
    names = report["compared"]
    several = len(names) > 2
    headings = ["task", "metric", *names]
    for name in names[1:]:
        headings.append(f"{name} - base" if several else "difference")
    lines = [headings]
    for row in report["results"]:
        metric = row["metric"] + (f" ({row['filter']})" if row["filter"] != "none" else "")
        lower = ", lower is better" if row["higher_is_better"] is False else ""
        values = [_with_error(row["values"][name]) for name in names]
        changes = [_with_error(row["differences"][name], "+") for name in names[1:]]
        lines.append([row["task"], metric + lower, *values, *changes])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    for file in report["saved"]:
        print(f"saved  {file}")


def _with_error(value: dict[str, float | None], sign: str = "") -> str:
    if value["value"] is None:
        return "-"
    error = f" ± {value['stderr']:.4f}" if value["stderr"] is not None else ""
    return f"{value['value']:{sign}.4f}{error}"

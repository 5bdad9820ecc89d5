"""``lightning-peft sweep``: train a recipe with several values of its settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import OptionParser, command_parser, refuse_unknown
from lightning_peft.cli.output import print_json, print_table, to_stderr
from lightning_peft.errors import ConfigError
from lightning_peft.recipe_files import resolved_recipes

if TYPE_CHECKING:
    from lightning_peft.sweeps.sweep import Sweep

ABOUT = "Train a recipe with several values of some keys, by Optuna, and compare."
# Options of `fit` without a dot that all trials can share.
_OF_FIT = ("config", "model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything")
_MORE = """\
  lightning-peft sweep sft-qlora --set r=8,16,64 --set lr=1e-4,3e-4
  lightning-peft sweep sft-qlora --set lr=1e-5..1e-3:log --set r=8,16 --trials 20 --pruner median

NAME is a key of the model, the data, the strategy, the optimizer or the Trainer, or a full key such
as trainer.strategy.init_args.r; lr is the learning rate. VALUES are parted by commas, or a range
LOW..HIGH, with :log by its logarithm. All other options are those of `lightning-peft fit`, and the
same for all trials. Every value is checked before the first step.

Trials train one after the other in this process; each is a run with a folder of its own, next to
that of the sweep, and is judged by what the recipe's BestCheckpoint monitors. After Ctrl-C or a
crash, --resume goes on, in the middle of a trial too.

exit code: 0 when done, 1 if trials failed, 2 for input that cannot be used, 130 after an interrupt
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    args, words = parser.parse_known_args(list(arguments))
    # argparse takes a positional argument for absent where options come first.
    recipe = words.pop(0) if words and not words[0].startswith("-") else None
    plain = [word for word in words if "." not in word.partition("=")[0]]
    refuse_unknown(plain, [*parser.known(), *(f"--{key}" for key in _OF_FIT)])
    with to_stderr():
        from lightning_peft.sweeps.settings import check_sweep
        from lightning_peft.sweeps.sweep import Sweep

        if args.resume is not None:
            others = (args.sampler, args.trials, args.pruner, args.seed, args.runs, args.folder)
            _refuse_others([recipe, *args.set, *others, args.prepare or None, *words])
            sweep = Sweep(args.resume)
        elif recipe is None:
            raise ConfigError("Name a recipe first: lightning-peft sweep sft-qlora --set r=8,16")
        elif args.runs is not None and args.folder is not None:
            raise ConfigError(
                "--runs and --folder exclude each other: the trials of a sweep lie next to its "
                "folder. Leave one of them out."
            )
        else:
            with resolved_recipes([f"--config={recipe}", *words]) as resolved:
                settings = check_sweep(
                    Path(recipe).stem,
                    resolved,
                    args.set,
                    args.sampler,
                    args.trials,
                    args.pruner or "none",
                    args.seed or 0,
                )
                sweep = Sweep.create(args.runs or Path("runs"), settings, args.folder)
        print(f"sweep {sweep.folder}", file=sys.stderr)
        done = True if args.prepare else _run(sweep)
    _show(sweep, args.json)
    if not done:
        return 130
    return 1 if any(row["error"] for row in sweep.rows()) else 0


def _parser() -> OptionParser:
    parser = command_parser("sweep", ABOUT, _MORE)
    parser.usage = "lightning-peft sweep RECIPE --set NAME=VALUES ... [options]"
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="NAME=VALUES", help="repeatable; see below")
    add("--sampler", choices=("grid", "random", "tpe"), help="default: grid; with ranges, tpe")
    add("--trials", type=int, metavar="N", help="how many runs, of random and tpe")
    add(
        "--pruner",
        choices=("none", "median", "hyperband"),
        help="ends trials that are worse than others at the same step; default: none",
    )
    add("--seed", type=int, help="of the sampler; default: 0")
    add("--runs", type=Path, metavar="FOLDER", help="default: runs")
    add("--folder", type=Path, help="of the sweep, and next to it of its trials; default: new")
    add("--prepare", action="store_true", help="check and write the folder; --resume trains")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the sweep in this folder")
    return parser


def _refuse_others(given: Sequence[Any]) -> None:
    if any(one is not None for one in given):
        raise ConfigError(
            "--resume goes on with a sweep as it was begun, and takes no recipe, values or other "
            "options. Leave them out, or begin a new sweep without --resume."
        )


def _run(sweep: Sweep) -> bool:
    done = False
    try:
        done = sweep.run(lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        if not done:
            print(f"Go on: lightning-peft sweep --resume {sweep.folder}", file=sys.stderr)
    return done


def _show(sweep: Sweep, as_json: bool) -> None:
    table = sweep.table()
    rows, best = table["trials"], table["best"]
    if as_json:
        print_json(table)
        return
    if not rows:
        return
    caption = f"best: trial {best['trial']}, {best['run']}" if best else "no trial was finished"
    print_table([_cells(row, table["metric"]) for row in rows], caption)


def _cells(row: dict[str, Any], metric: str) -> dict[str, str]:
    value, seconds = row[metric], row["seconds"]
    return {
        "trial": str(row["trial"]),
        **{name: str(value) for name, value in row["values"].items()},
        metric: "-" if value is None else f"{value:.4g}",
        "steps": str(row["steps"] or "-"),
        "seconds": "-" if seconds is None else f"{seconds:.0f}",
        "state": row["error"] or row["state"],
        "run": Path(row["run"]).name,
    }

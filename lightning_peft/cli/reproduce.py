"""``lightning-peft reproduce``: repeat a run and compare the results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import command_parser
from lightning_peft.cli.output import print_json, to_stderr

if TYPE_CHECKING:
    from lightning_peft.runs.reproduction import Reproduction

ABOUT = "Run the recipe of a finished run again, and compare losses, metrics and weights."
_MORE = """\
The recipe, the data and the model have to be where they were. On the same kind of processor, with
the same versions, the second run equals the first bit for bit; elsewhere the metrics have to be
within 1 %.

exit code: 0 if it was reproduced, 1 if not, 2 for bad input, 130 after an interrupt
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser("reproduce", ABOUT, _MORE)
    parser.add_argument("run", type=Path, help="folder of the run")
    args = parser.parse_args(list(arguments))
    with to_stderr(args.json):
        again, reproduction = _rerun(args.run)
    if again is None:
        return 130
    if args.json:
        print_json({"passed": reproduction.passed, "folder": str(again), **asdict(reproduction)})
    else:
        _show(reproduction, again)
    return 0 if reproduction.passed else 1


def _rerun(path: Path) -> tuple[Path | None, Any]:
    from torch import set_num_threads

    from lightning_peft.cli.training import run
    from lightning_peft.runs import folder, reproduction

    first = folder.RunFolder(path)
    threads = reproduction.finished_result(first)["hardware"]["threads"]
    first.check_directory()
    # Sums are parted among threads, and their last bits depend on how.
    set_num_threads(threads)
    second = folder.RunFolder.create(path.resolve().parent, f"again {path.name[16:]}")
    words = [f"--config={first.recipe}", f"--run_dir={second.path}"]
    session = run("fit", words, first.decided())
    if session.saved is not None:
        print("lightning-peft: stopped; nothing was compared", file=sys.stderr)
        return None, None
    return second.path, reproduction.compare(first, second)


def _show(reproduction: Reproduction, again: Path) -> None:
    print(f"steps compared          {reproduction.steps}")
    print(f"largest loss difference {reproduction.loss_difference:.3g}")
    print(f"largest weight difference {reproduction.adapter_difference:.3g}")
    for name, (then, now) in reproduction.metrics.items():
        print(f"{name:<24}{then:.6g} then, {now:.6g} now")
    for name, (then, now) in reproduction.other.items():
        print(f"other {name}: {then} then, {now} now")
    verdict = "bit-for-bit identical" if reproduction.identical else "within 1 %"
    print(f"reproduced: {verdict}" if reproduction.passed else "not reproduced")
    print(f"second run  {again}")

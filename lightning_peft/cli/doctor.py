"""``lightning-peft doctor``: check the environment for training."""

from __future__ import annotations

import argparse
import faulthandler
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_json, to_stderr

if TYPE_CHECKING:
    from lightning_peft.doctor.results import CheckResult

ABOUT = "Check that this machine can train, and suggest fixes."
_MORE = """\
exit code: 0 if everything that training needs works (warnings included), 1 if something that it
needs is broken, 2 for bad input
"""
_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED ", "skipped": "--     "}
_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
_QUIET_SECONDS = 2.0


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from rich.console import Console

    from lightning_peft.doctor import checks

    args = _parser().parse_args(list(arguments))
    options = checks.DoctorOptions(device=args.device, folder=Path(args.folder), hub=args.hub)
    # A broken kernel can end the process; then the trace and the last line say which it was.
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    console = Console(highlight=False, emoji=False)
    results = []
    for result in checks.run_checks(options, _progress):
        results.append(result)
        if not args.json:
            _show(console, result)
    broken = [result.name for result in results if result.status == "failed"]
    if args.json:
        print_json(_as_dict(results, passed=not broken))
    else:
        unsure = sum(result.status == "warning" for result in results)
        warned = f"; warnings: {unsure}" if unsure else ""
        works = f"Everything that training needs works{warned}."
        print(f"\nBroken: {', '.join(broken)}." if broken else f"\n{works}")
    return 1 if broken else 0


def _parser() -> OptionParser:
    parser = command_parser("doctor", ABOUT, _MORE)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to try"
    )
    parser.add_argument("--folder", default=".", help="where runs would be written")
    parser.add_argument(
        "--hub",
        action=argparse.BooleanOptionalAction,
        help="require the Hub or skip the check; by default an unreachable Hub is a warning",
    )
    return parser


def _as_dict(results: list[CheckResult], passed: bool) -> dict[str, Any]:
    keys = ("name", "status", "detail", "remedy", "seconds")
    checks = [{key: getattr(result, key) for key in keys} for result in results]
    return {"version": version("lightning-peft"), "passed": passed, "checks": checks}


@contextmanager
def _progress(name: str) -> Iterator[None]:
    """Says what runs: at once on a terminal, elsewhere only if it takes long."""
    from rich.console import Console

    console = Console(stderr=True)
    # What the parts under trial print must not get between the lines, or into the JSON.
    with to_stderr():
        if console.is_terminal:
            with console.status(f"checking {name}"):
                yield
            return
        say = threading.Timer(_QUIET_SECONDS, print, [f"checking {name} ..."], {"file": sys.stderr})
        say.daemon = True
        say.start()
        try:
            yield
        finally:
            say.cancel()


def _show(console: Any, result: CheckResult) -> None:
    from rich.markup import escape

    mark = f"[{_STYLES[result.status]}]{_MARKS[result.status]}[/]"
    line = f"{mark} [bold]{result.name}[/]: {escape(result.detail)}"
    console.print(line, soft_wrap=True)
    if result.remedy:
        console.print(f"{'':8}fix: {escape(result.remedy)}", style="yellow", soft_wrap=True)

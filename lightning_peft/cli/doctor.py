"""``lightning-peft doctor``: does this machine have what training needs."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import OptionParser

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
    """Runs the command.

    Returns:
        The exit code: 0 if everything needed works, 1 if something is broken. Bad
        arguments exit with 2.
    """
    from rich.console import Console

    from lightning_peft.doctor import checks

    args = _parser().parse_args(list(arguments))
    options = checks.DoctorOptions(device=args.device, folder=Path(args.folder), hub=args.hub)
    # A broken kernel can end the process; then the trace and the last line say which it was.
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    console = Console(highlight=False)
    results = []
    for result in checks.run_checks(options, _progress):
        results.append(result)
        if not args.json:
            _show(console, result)
    broken = [result.name for result in results if result.status == "failed"]
    if args.json:
        print(json.dumps(_as_dict(results, passed=not broken), indent=2))
    else:
        unsure = sum(result.status == "warning" for result in results)
        warned = f"; warnings: {unsure}" if unsure else ""
        works = f"Everything that training needs works{warned}."
        print(f"\nBroken: {', '.join(broken)}." if broken else f"\n{works}")
    return 1 if broken else 0


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="lightning-peft doctor",
        description=ABOUT,
        epilog=_MORE,
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to try"
    )
    parser.add_argument("--folder", default=".", help="where runs would be written")
    parser.add_argument(
        "--hub",
        action=argparse.BooleanOptionalAction,
        help="require the Hub or skip the check; by default an unreachable Hub is a warning",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
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
    with redirect_stdout(sys.stderr):
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
    remedy = f"fix: {result.remedy}" if result.remedy else ""
    mark = _MARKS[result.status]
    if not console.is_terminal:
        print(f"{mark} {result.name}: {result.detail}", flush=True)
        if remedy:
            print(f"{'':8}{remedy}", flush=True)
        return
    from rich.markup import escape

    console.print(
        f"[{_STYLES[result.status]}]{mark}[/] [bold]{result.name}[/]: {escape(result.detail)}"
    )
    if remedy:
        console.print(f"{'':8}{escape(remedy)}", style="yellow")

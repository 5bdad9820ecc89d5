"""``lightning-peft verify``: the checks on the user's own module and data, without training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING

from lightning_peft.errors import ConfigError, LightningPeftError

if TYPE_CHECKING:
    from lightning_peft.engine.verification.result import Verification

ABOUT = "Check the adapters of a LightningCLI config on its first batch, without training."
_MORE = """\
Everything else is passed to LightningCLI: its keys (model, data, trainer, ckpt_path) in the file,
or as overrides on the command line, such as --trainer.strategy=qlora or --model.lr=0.1.

exit code: 0 if no check failed, 1 if one did or the module cannot be adapted, 2 for bad input
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 if no check failed, 1 if one did, 2 if the config cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-peft verify",
        description=ABOUT,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", default=[], help="YAML file as for LightningCLI; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given, rest = parser.parse_known_args(list(arguments))
    lightning_arguments = [f"--config={file}" for file in given.config] + rest
    run = import_module("lightning_peft.plugin.verification_run")
    try:
        # Whatever the user's own code prints, the result alone goes to the standard output.
        with redirect_stdout(sys.stderr) if given.json else nullcontext():
            module, verification = run.verify_config(lightning_arguments, announce=not given.json)
    except ConfigError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 2
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 1
    if given.json:
        print(_as_json(module, verification))
    else:
        _show(module, verification)
    return 0 if verification.passed else 1


def _as_json(module: str, verification: Verification) -> str:
    checks = [
        {"name": check.name, "passed": check.passed, "detail": check.detail}
        for check in verification.checks
    ]
    return json.dumps({"module": module, "passed": verification.passed, "checks": checks}, indent=2)


def _show(module: str, verification: Verification) -> None:
    console = import_module("rich.console").Console()
    if not console.is_terminal:
        print(verification)
        return
    table = import_module("rich.table").Table(title=f"Adapters of {module}", title_justify="left")
    for heading in ("", "check", "found"):
        table.add_column(heading)
    marks = {True: "[green]ok[/]", False: "[bold red]FAIL[/]", None: "[yellow]--[/]"}
    escape = import_module("rich.markup").escape
    for check in verification.checks:
        table.add_row(marks[check.passed], check.name, escape(check.detail))
    console.print(table)

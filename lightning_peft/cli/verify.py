"""``lightning-peft verify``: check a config before training, or a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.cli.options import add_config_option, command_parser
from lightning_peft.cli.output import print_json, to_stderr
from lightning_peft.errors import BaseMismatchError, ConfigError
from lightning_peft.recipe_files import resolved_recipes

if TYPE_CHECKING:
    from lightning_peft.engine.verification.result import Verification

ABOUT = "Check the adapters of a config before training, or what a run has left."
_MORE = """\
With RUN, a folder below `runs`: the hashes of recipe and adapters, whether they belong together,
whether the data is still the same, whether the base is the one that was trained on, and the checks
of the engine on the best checkpoint. With an adapter folder outside of a run: its hash.

With --config, everything else is passed to LightningCLI: its keys (model, data, trainer, ckpt_path)
in the file, or as overrides on the command line, such as --trainer.strategy=qlora or
--model.lr=0.1.

exit code: 0 if no check failed, 1 if one did or the module cannot be adapted, 2 for bad input
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = command_parser("verify", ABOUT, _MORE)
    parser.usage = "lightning-peft verify (RUN | --config FILE ...) [--json] [--KEY VALUE ...]"
    add_config_option(parser)
    words = list(arguments)
    # No argument of the parser: it would take the values of LightningCLI's options for the run.
    run = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    args, rest = parser.parse_known_args(words)
    with to_stderr(args.json):
        module, verification = _verify(run, args.config, rest, announce=not args.json)
    if args.json:
        checks = [
            {"name": check.name, "passed": check.passed, "detail": check.detail}
            for check in verification.checks
        ]
        print_json({"module": module, "passed": verification.passed, "checks": checks})
    else:
        _show(module, verification)
    return 0 if verification.passed else 1


def _verify(
    path: Path | None, files: list[str], rest: list[str], announce: bool
) -> tuple[str, Verification]:
    from lightning_peft.plugin.verification_run import verify_config

    configs = [f"--config={file}" for file in files]
    if path is None:
        with resolved_recipes([*configs, *rest]) as words:
            verified = verify_config(words, announce=announce)
        return verified.module, verified.verification
    if configs:
        raise ConfigError(
            f"Both a run ({path}) and --config were given. A run has its own recipe: leave "
            "--config out."
        )
    from lightning_peft import engine
    from lightning_peft.runs import integrity

    checks = integrity.file_checks(path)
    run = integrity.run_of(path)
    if run is None:
        detail = "there is no run folder around the adapter, so no recipe to build them from"
        checks.append(engine.Check("base, data and the checks of the engine", None, detail))
        return path.name, engine.Verification(checks)
    run.check_directory(rest)
    checkpoint = run.newest_checkpoint()
    best = run.checkpoints / "best.ckpt"
    words = [f"--config={run.recipe}", f"--ckpt_path={best if best.is_file() else checkpoint}"]
    try:
        verified = verify_config([*words, *rest], announce=False)
    except BaseMismatchError as error:
        checks.append(engine.Check("the base is the one that was trained on", False, str(error)))
        return run.path.name, engine.Verification(checks)
    detail = "checksums of every frozen tensor"
    checks.append(engine.Check("the base is the one that was trained on", True, detail))
    checks.append(integrity.data_check(run, verified.datamodule))
    return run.path.name, engine.Verification([*checks, *verified.verification.checks])


def _show(module: str, verification: Verification) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        print(verification)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Adapters of {module}", title_justify="left")
    for heading in ("", "check", "found"):
        table.add_column(heading)
    marks = {True: "[green]ok[/]", False: "[bold red]FAIL[/]", None: "[yellow]--[/]"}
    for check in verification.checks:
        table.add_row(marks[check.passed], check.name, escape(check.detail))
    console.print(table)

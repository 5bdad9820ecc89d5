"""``lightning-peft check``: whether every row can be trained on, as an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from lightning_peft.cli.data_config import data_from_config
from lightning_peft.cli.options import OptionParser
from lightning_peft.errors import ConfigError, LightningPeftError

ABOUT = "Check every row of your data, with an exit code for CI."
_MORE = """\
Every row is read and checked as at `fit`: encoding, delimiter, columns, roles, duplicates, splits,
keys that nothing uses. With --config or --tokenizer the chat template, special tokens and lengths
are checked too. The arguments of the data follow, such as --encoding cp1252, --delimiter ';',
--sheet Rows, --columns '{"prompt": "question"}', and the overrides of a config, as for `fit`.

exit code: 0 if every row can be trained on, 1 if rows have problems, 2 if the data cannot be read
"""
# What makes the check one of tokens.
_OF_TOKENS = ("--tokenizer", "--processor", "--data.init_args.tokenizer")
_TOKENS = "lightning_peft.SupervisedData"
_ROWS = "lightning_peft.data.preview.CheckedRows"


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 if all is well, 1 if rows have problems, 2 if the data cannot be read.
    """
    args, rest = _parser().parse_known_args(list(arguments))
    rest = _with_configs(rest)
    try:
        # Whatever libraries print, the result alone goes to the standard output.
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            report = checked(args.config, rest)
    except LightningPeftError as error:
        if args.json:
            print(json.dumps({"passed": False, "error": str(error)}, indent=2))
        raise
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0 if report["passed"] else 1


def _with_configs(words: Sequence[str]) -> list[str]:
    """Returns the arguments with DATA as the option that it stands for."""
    result: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        is_value = before.startswith("--") and "=" not in before
        result.append(word if word.startswith("-") or is_value else f"--data={word}")
    return result


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="lightning-peft check",
        usage="lightning-peft check DATA [--config RECIPE ...] [--json] [--KEY VALUE ...]",
        description=ABOUT,
        epilog=_MORE,
    )
    parser.add_argument(
        "--config", action="append", default=[], help="recipe, or YAML file; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def checked(configs: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """Returns the result of checking all rows, ready for JSON.

    Args:
        configs: Recipes or YAML files.
        words: Arguments of the data, and overrides.

    Raises:
        ConfigError: If the data cannot be read at all.
    """
    tokens = bool(configs) or any(word.startswith(_OF_TOKENS) for word in words)
    named = any(word.partition("=")[0] in ("--data", "--data.init_args.data") for word in words)
    if not named and not configs:
        raise ConfigError("Nothing to check: name a file, a folder or a dataset on the hub.")
    from lightning_peft.data.preview import preview

    data = data_from_config(configs, words, _TOKENS if tokens else _ROWS, _parser().known())
    numbers = preview(data, 0).numbers
    left_out = bool(data.hparams["skip_bad_rows"])
    names = ("data", "rows", "rejected", "shape", "columns", "columns_unused", "keys_unused")
    more = (
        "read_as",
        "files_left_out",
        "splits",
        "split_by",
        "shared_prompts",
        "problems",
        "labels",
        "max_length",
    )
    report = {name: numbers[name] for name in (*names, *more) if name in numbers}
    passed = left_out or not numbers["problems"]
    if passed and tokens and not left_out:
        # What is wrong with all rows together, such as a split without any.
        data.setup("fit")
    return {"passed": passed, "tokens_checked": tokens, **report}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    from lightning_peft.cli import preview

    console = Console(highlight=False)
    for line in preview.overview(report):
        console.print(line, markup=False, soft_wrap=True)
    if not report["tokens_checked"]:
        console.print(
            "tokens    not checked: name a --tokenizer or a --config for lengths and templates",
            markup=False,
            soft_wrap=True,
        )
    preview.show_problems(console, report)

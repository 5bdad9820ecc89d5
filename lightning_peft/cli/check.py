"""``lightning-peft check``: validate all rows; the exit code is the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_peft.cli.data_config import data_from_config
from lightning_peft.cli.options import OptionParser, add_config_option, command_parser
from lightning_peft.cli.output import print_json, to_stderr
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
# Of the numbers of a preview.
_REPORTED = (
    *("data", "rows", "rejected", "shape", "columns", "columns_unused", "keys_unused"),
    *("read_as", "files_left_out", "splits", "split_by", "shared_prompts", "problems"),
    *("labels", "max_length", "statistics"),
)
_TOKENS = "lightning_peft.SupervisedData"
_ROWS = "lightning_peft.data.preview.CheckedRows"


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args, rest = _parser().parse_known_args(list(arguments))
    rest = _with_configs(rest)
    try:
        with to_stderr(args.json):
            report = checked(args.config, rest)
    except LightningPeftError as error:
        if args.json:
            print_json({"passed": False, "error": str(error)})
        raise
    if args.json:
        print_json(report)
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
    parser = command_parser("check", ABOUT, _MORE)
    parser.usage = "lightning-peft check DATA [--config RECIPE ...] [--json] [--KEY VALUE ...]"
    add_config_option(parser)
    return parser


def checked(configs: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """Returns the result of checking all rows, ready for JSON."""
    tokens = bool(configs) or any(word.startswith(_OF_TOKENS) for word in words)
    named = any(word.partition("=")[0] in ("--data", "--data.init_args.data") for word in words)
    if not named and not configs:
        raise ConfigError("Nothing to check: name a file, a folder or a dataset on the hub.")
    from lightning_peft.data.preview import preview

    data = data_from_config(configs, words, _TOKENS if tokens else _ROWS, _parser().known())
    numbers = preview(data, 0).numbers
    left_out = bool(data.hparams["skip_bad_rows"])
    report = {name: numbers[name] for name in _REPORTED if name in numbers}
    passed = left_out or not numbers["problems"]
    if passed and tokens and not left_out:
        # What is wrong with all rows together, such as a split without any.
        data.setup("fit")
    return {"passed": passed, "tokens_checked": tokens, **report}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console

    from lightning_peft.cli import preview

    console = Console(highlight=False)
    lines = preview.overview(report)
    if not report["tokens_checked"]:
        why = "name a --tokenizer or a --config for lengths and templates"
        lines.append(f"tokens    not checked: {why}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    preview.show_problems(console, report)

"""``lightning-peft merge``: merge the adapter into a 16-bit model folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_report, progress_to_stderr, quiet_libraries

ABOUT = "Merge an adapter into a 16-bit model folder, tensor by tensor, and say what that costs."
_MORE = """\
ADAPTER is an adapter folder, a .ckpt file, or the folder of a run (its newest adapter).

A QLoRA adapter is merged into what its quantized base stands for, on which it was trained. The
error of that, of merging into the original base, and of quantizing the sum again, is printed.

exit code: 0 if the model was written, 1 if it cannot be merged, 2 for bad input
"""


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which base is meant."""
    parser.add_argument("--base", help="folder or hub name; by default the one recorded")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the hub")
    parser.add_argument(
        "--no-check-base",
        dest="check_base",
        action="store_false",
        help="take a base other than the recorded one",
    )


def add_merge_options(parser: Any) -> None:
    """Adds the options that say how the adapter is merged."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the weights; by default that of the base, and bfloat16 for a wider one",
    )
    parser.add_argument(
        "--into",
        choices=("dequantized", "original"),
        help="which base of a QLoRA adapter; by default the dequantized one",
    )
    parser.add_argument("--prompts", help="text file, one prompt a line, to compare on")
    parser.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="do not compare outputs, which loads the model",
    )


def merge_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of ``export.merging.merge`` that the options above give."""
    names = ("base", "revision", "check_base", "dtype", "into", "measure", "prompts")
    arguments = {name: getattr(args, name) for name in names}
    if args.prompts:
        from lightning_peft.chat.comparison import read_prompts

        arguments["prompts"] = [prompt.text for prompt in read_prompts(args.prompts)]
    return arguments


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    print_report(_parser().parse_args(arguments), _merge, lambda report: print(as_text(report)))
    return 0


def _parser() -> OptionParser:
    parser = command_parser("merge", ABOUT, _MORE)
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    add_base_options(parser)
    add_merge_options(parser)
    return parser


def _merge(args: argparse.Namespace) -> dict[str, Any]:
    options = merge_arguments(args)
    quiet_libraries()
    from lightning_peft.export.merging import merge

    with progress_to_stderr() as progress:
        report: dict[str, Any] = merge(
            args.adapter, Path(args.output), **options, progress=progress
        )
    return report


def as_text(report: dict[str, Any]) -> str:
    """Returns the merge report as text and a table."""
    checked = "is the one in training" if report["base_checked"] else "was not compared: no record"
    lines = [
        f"adapter  {report['adapter']}",
        f"base     {report['base']} ({checked})",
        f"merged   into the {report['into']} base, {len(report['layers'])} layers, "
        f"{report['dtype']}",
        f"written  {report['output']} ({report['bytes'] / 1e6:,.1f} MB)",
        "",
        "difference to the base with the adapter as it was trained:",
        f"  {'way':<22}{'weights, of adapter':>24}{'logits':>10}{'KL/token':>12}{'same token':>12}",
    ]
    logits = report["logit_errors"]
    for way, weights in report["weight_errors"].items():
        if weights is None and way not in logits:
            continue
        name = way + (" (chosen)" if way == report["into"] else "")
        share = f"{weights['median']:.2%}, worst {weights['worst']:.2%}" if weights else ""
        line = f"  {name:<22}{share:>24}"
        if way in logits:
            errors = logits[way]
            line += (
                f"{errors['relative']:>10.2%}{errors['kl']:>12.2e}{errors['same_choice']:>12.1%}"
            )
        lines.append(line)
    if report["not_measured"]:
        lines.append(f"outputs were not compared: {report['not_measured']}")
    return "\n".join(lines)

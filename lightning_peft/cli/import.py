"""``lightning-peft import``: convert checkpoints of other programs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_report
from lightning_peft.errors import ConfigError

ABOUT = "Bring a checkpoint with adapters of PEFT over: weights, heads, optimizer."
_MORE = """\
CHECKPOINT is a .ckpt of a LightningModule with PEFT inside, a file with adapters only (.pt, .bin,
.safetensors), or a PEFT folder. It cannot run code. The new file is OUTPUT, by default
CHECKPOINT-imported.ckpt, with an adapter folder in adapters/ next to it. It is loaded once; what of
the old file has no place is named.

exit code: 0 if the new file was written, 1 if the old one cannot be brought over, 2 for bad input
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    print_report(_parser().parse_args(list(arguments)), _import, _show)
    return 0


def _parser() -> OptionParser:
    parser = command_parser("import", ABOUT, _MORE)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--module", required=True, help="the LightningModule, package.module:Class")
    parser.add_argument("--output", type=Path, help="the new .ckpt")
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the constructor, in YAML; repeatable",
    )
    parser.add_argument(
        "--lora-alpha",
        action="append",
        default=[],
        metavar="[PART=]NUMBER",
        help="the scale, where the file lacks it; repeatable, for parts with different ones",
    )
    parser.add_argument("--use-rslora", action="store_true", help="the scale is alpha / sqrt(r)")
    parser.add_argument(
        "--allow-unmapped", action="store_true", help="leave out keys that have no place"
    )
    parser.add_argument("--adapt", help="the submodule that a folder or a file's keys are of")
    return parser


def _import(args: Namespace) -> dict[str, Any]:
    from lightning_peft.plugin.importing import import_checkpoint

    source: Path = args.checkpoint
    default = source.with_name(f"{source.name.removesuffix('.ckpt')}-imported.ckpt")
    result = import_checkpoint(
        source,
        args.module,
        args.output or default,
        arguments=dict(map(_argument, args.init)),
        lora_alpha=_alpha(args.lora_alpha),
        use_rslora=args.use_rslora,
        allow_unmapped=args.allow_unmapped,
        adapt=args.adapt,
    )
    return {
        "output": str(result.output),
        "adapter": str(result.adapter),
        "optimizer": result.optimizer,
        **{key: value for key, value in vars(result.loaded).items() if key != "names"},
    }


def _alpha(words: list[str]) -> float | dict[str, float] | None:
    parts = [word.rpartition("=") for word in words]
    try:
        numbers = {name: float(value) for name, _, value in parts}
    except ValueError as error:
        raise ConfigError(f"--lora-alpha {words}: write NUMBER, or PART=NUMBER.") from error
    if len(words) > 1 and not all(equals for _, equals, _ in parts):
        raise ConfigError(f"--lora-alpha {words}: write NUMBER, or PART=NUMBER.")
    return next(iter(numbers.values()), None) if "" in numbers else numbers or None


def _argument(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--init {text!r}: write NAME=VALUE.")
    return name, yaml.safe_load(value)


def _show(report: dict[str, Any]) -> None:
    print(f"checkpoint  {report['output']}")
    print(f"adapter     {report['adapter']}")
    print(f"adapters    on {report['adapters']} layers of {', '.join(report['parts']) or 'it'}")
    print(f"optimizer   {report['optimizer']}")
    for title, key in (
        ("trained in full", "saved"),
        ("base weights other than the constructor's, kept in the new file", "base"),
        ("not in the old file, as the constructor makes them", "absent"),
        ("left out", "unmapped"),
    ):
        if report[key]:
            more = f" and {len(report[key]) - 5} more" if len(report[key]) > 5 else ""
            print(f"{title}: {', '.join(report[key][:5])}{more}")

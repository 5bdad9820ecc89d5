"""``lightning-peft plan``: estimate the memory of a run before it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import (
    OptionParser,
    add_config_option,
    command_parser,
    refuse_unknown,
)
from lightning_peft.cli.output import print_json, to_stderr

if TYPE_CHECKING:
    from lightning_peft.plan.method_comparison import MethodComparison

ABOUT = "Predict the memory of a run from the model's config, and say which method to choose."
_MORE = """\
With --config, the run of a recipe is planned, with the overrides of `fit`: lightning-peft plan
--config sft-qlora --model.init_args.model=NAME --gpu 24GB. Options that are named here go first.

Only the config of the model is read, no weights. A run that does not fit is an answer and no error.

exit code: 0 if the question was answered, 1 if the model cannot be planned for, 2 for bad input
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _given(list(arguments))
    with to_stderr(), _progress() as progress:
        comparison = _survey(args, progress)
    if args.json:
        print_json(comparison.as_dict())
    else:
        from lightning_peft.cli.plan_display import show

        show(comparison)
    return 0


def _given(arguments: list[str]) -> argparse.Namespace:
    """Returns the arguments, those of ``--config`` below those that are named here."""
    parser = _parser()
    args, overrides = parser.parse_known_args(arguments)
    if args.config:
        from lightning_peft.cli.plan_config import plan_from_config

        length = not any(one.startswith("--seq-len") for one in arguments)
        of_config = parser.parse_args(plan_from_config(args.config, overrides, length))
        # What is named here is put over it.
        return parser.parse_known_args(arguments, of_config)[0]
    refuse_unknown(overrides, parser.known())
    if overrides or args.model is None:
        parser.error(
            f"unrecognized arguments: {' '.join(overrides)}"
            if overrides
            else "the following arguments are required: --model, or --config"
        )
    return args


def _parser() -> OptionParser:
    parser = command_parser("plan", ABOUT, _MORE)
    add = parser.add_argument
    add_config_option(parser)
    add("--model", help="name on the hub, or a folder with a config.json")
    add("--method", choices=("full", "lora", "qlora"), default="qlora", help="default: qlora")
    add("--seq-len", type=int, default=512, help="tokens in a row; default: 512")
    add("--batch-size", type=int, default=1, help="rows in a batch; default: 1")
    add("--accumulate", type=int, default=1, help="batches for each step; default: 1")
    add("--gpu", help="an amount such as 24GB, a GPU such as rtx4090 or a100-80, or 'this'")
    add("--r", type=int, default=16, help="rank of the adapters; default: 16")
    add("--target-modules", nargs="+", help="layers to adapt; default: all linear layers")
    add(
        "--target-parameters",
        nargs="*",
        help="weights of experts to adapt; default: all, none after the bare option",
    )
    add("--modules-to-save", nargs="+", help="modules that are trained in full")
    add(
        "--optimizer",
        default="auto",
        help="adamw, adamw_fused, adamw_torch or a name of bitsandbytes such as "
        "paged_adamw_8bit; by default what the strategy takes",
    )
    add(
        "--gradient-checkpointing",
        choices=("auto", "on", "off"),
        default="auto",
        help="by default as in a run: off where everything fits on --gpu; without --gpu, on for "
        "qlora",
    )
    add(
        "--logits",
        choices=("chunked", "all"),
        default="chunked",
        help="whether causal-LM logits are computed in chunks, as CausalLM does (the default), "
        "or all at once, as in preference tuning",
    )
    add("--precision", default="32-true", help="the Trainer's; default: 32-true, as it is loaded")
    add("--dtype", default="auto", help="dtype of the weights; by default that of the config")
    add("--revision", help="branch, tag or commit on the hub")
    add(
        "--no-limits",
        action="store_true",
        help="do not search the largest batch and the longest sequence",
    )
    _add_processes(parser)
    return parser


def _add_processes(parser: OptionParser) -> None:
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="GPUs in a node, each with a process; default: 1")
    add("--nodes", type=int, default=1, help="nodes; default: 1")
    add(
        "--sharding",
        choices=("fsdp2",),
        help="share the frozen base; by default each GPU has all of it (DDP)",
    )
    figures = {
        "--tflops": "TFLOP/s of a GPU",
        "--memory-bandwidth": "GB/s of its memory",
        "--link-bandwidth": "GB/s that a GPU sends to the others of its node",
        "--network-bandwidth": "GB/s that a node sends to the others",
    }
    for name, what in figures.items():
        add(name, type=float, help=f"{what}; by default what the maker of --gpu specifies")


def _survey(args: argparse.Namespace, progress: Callable[[str], None]) -> MethodComparison:
    from lightning_peft.plan.cluster import FIGURES, cluster_of
    from lightning_peft.plan.device_memory import device_memory
    from lightning_peft.plan.method_comparison import compare_methods
    from lightning_peft.plan.settings import PlanSettings
    from lightning_peft.plan.sources import from_name

    device = None if args.gpu is None else device_memory(args.gpu)
    given = {name: getattr(args, name) for name in FIGURES}
    cluster = cluster_of(device.name if device else None, args.gpus, args.nodes, given)
    targets = args.target_modules
    lora: dict[str, Any] = {"r": args.r}
    if targets is not None:
        # One word may be a regular expression, or "all-linear".
        lora["target_modules"] = targets[0] if targets == ["all-linear"] else targets
    if args.target_parameters is not None:
        lora["target_parameters"] = args.target_parameters
    if args.modules_to_save is not None:
        lora["modules_to_save"] = args.modules_to_save
    run = PlanSettings(
        method=args.method,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        accumulate=args.accumulate,
        precision=args.precision,
        optimizer=args.optimizer,
        gradient_checkpointing={"on": True, "off": False}.get(args.gradient_checkpointing, "auto"),
        lora=lora,
        device="cuda" if device is None else device.kind,
        processes=args.gpus * args.nodes,
        sharding=args.sharding,
    )
    source = from_name(args.model, args.revision, args.dtype)
    if args.logits == "chunked" and source.causal:
        from lightning_peft.tasks.token_loss import chunked_loss

        step: Any = chunked_loss
        source = replace(source, step=step)
    compared = compare_methods(source, run, device, limits=not args.no_limits, progress=progress)
    return replace(compared, cluster=cluster)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says what is predicted: in one changing line on a terminal, line by line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("reading the config") as status:
            yield lambda doing: status.update(f"predicting {doing}")
        return
    yield lambda doing: print(f"predicting {doing} ...", file=sys.stderr)

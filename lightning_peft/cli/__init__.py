"""The command line ``lightning-peft``: parse, call, print."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Literal

from lightning_peft.errors import LightningPeftError


def demo(
    model: str | None = None,
    method: Literal["qlora", "lora", "full"] = "qlora",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    output: str = "demo-output",
) -> None:
    """Fine-tune a small language model on question and answer pairs and show what changed.

    Without arguments it runs offline on a CPU in about two minutes, with a tiny base model and
    data that come with the package.

    Args:
        model: Hub name or folder of a causal language model; by default the tiny one shipped.
        method: QLoRA (4-bit base), LoRA (base as it is), or full fine-tuning.
        seed: Seed of adapters, shuffling and everything else random.
        steps: Optimizer steps.
        learning_rate: Peak learning rate; by default one that suits the method.
        output: Folder for the checkpoint, the adapter and the result.
    """
    run = import_module("lightning_peft.demo.run").run_demo
    run(
        model=model,
        method=method,
        seed=seed,
        steps=steps,
        learning_rate=learning_rate,
        output=output,
    )


COMMANDS: dict[str, Callable[..., None]] = {"demo": demo}
# Their arguments are those of LightningCLI or of a class that is expensive to import, which a
# parser made from a function cannot have.
OWN_PARSERS = ("chat", "compare", "doctor", "export", "merge", "preview", "recipes", "verify")
TRAINING = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, or 1 where a command failed for a reason it can explain, or 2 for bad
        input, or 130 after an interrupt.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] and words[0] in OWN_PARSERS:
            return int(import_module(f"lightning_peft.cli.{words[0]}").main(words[1:]))
        if words[:1] and words[0] in TRAINING:
            return int(import_module("lightning_peft.cli.training").main(words[0], words[1:]))
    except KeyboardInterrupt:
        print("lightning-peft: stopped", file=sys.stderr)
        return 130
    jsonargparse = import_module("jsonargparse")
    version = import_module("importlib.metadata").version("lightning-peft")
    parser = jsonargparse.ArgumentParser(
        prog="lightning-peft", description="LoRA and QLoRA for PyTorch Lightning.", version=version
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, function in COMMANDS.items():
        about = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
        command = jsonargparse.ArgumentParser(description=about)
        command.add_argument("--config", action="config", help="YAML file with these arguments.")
        command.add_function_arguments(function)
        commands.add_subcommand(name, command, help=about.partition("\n")[0])
    for name in OWN_PARSERS:
        about = import_module(f"lightning_peft.cli.{name}").ABOUT
        commands.add_subcommand(name, jsonargparse.ArgumentParser(description=about), help=about)
    for name, about in import_module("lightning_peft.cli.training").ABOUT.items():
        commands.add_subcommand(name, jsonargparse.ArgumentParser(description=about), help=about)
    given = parser.parse_args(words)
    chosen = given[given["command"]].as_dict()
    chosen.pop("config", None)
    try:
        COMMANDS[given["command"]](**chosen)
    except LightningPeftError as error:
        print(f"lightning-peft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lightning-peft: stopped", file=sys.stderr)
        return 130
    return 0

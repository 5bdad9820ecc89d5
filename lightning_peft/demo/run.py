"""The demo: fine-tune a small language model and report every number."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from lightning_peft import engine
from lightning_peft.demo.exercises import BASE as BASE
from lightning_peft.demo.exercises import INSTRUCTIONS as INSTRUCTIONS
from lightning_peft.demo.exercises import TEMPLATE as TEMPLATE
from lightning_peft.demo.exercises import Exercise, choose_exercise
from lightning_peft.demo.phases import phase
from lightning_peft.plan.memory import static_memory
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import LateBoundCallback, bind_to_lightning, namespace_in_use
from lightning_peft.plugin.strategies import LoRAStrategy, QLoRAStrategy
from lightning_peft.tasks.causal_lm import CausalLM

RANK = 16
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "Full fine-tuning"}


@dataclass
class Losses:
    """Mean loss per answer token, in nats; ``train`` only where it takes no time."""

    train: float | None
    held_out: float


def run_demo(
    model: str | None = None,
    method: str = "qlora",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    output: str = "demo-output",
) -> dict[str, Any]:
    """Runs the demo and returns its result record; see ``lightning-peft demo --help``."""
    console = Console()
    lightning = import_module(namespace_in_use())
    quiet()
    lightning.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    folder = Path(output)
    with phase(console, "Reading the model's configuration"):
        exercise = choose_exercise(model, folder, steps)
    rate = learning_rate or exercise.rates[method]
    about = f"{METHODS[method]}. {escape(exercise.about)}"
    console.print(Panel(about, title="lightning-peft demo", expand=False))
    with phase(console, "Preparing the data"):
        data = exercise.data(folder / "data")
    task = CausalLM(exercise.source, learning_rate=rate, dtype="float32")
    trainer, interruption = make_trainer(lightning, method, exercise.steps, folder)
    with phase(console, "Loading and evaluating the base") as end_spinner:
        before = measure(trainer, task, data, exercise, end_spinner)
    console.print("[bold]What is adapted and quantized[/bold]")
    adapted = engine.record_of(task) is not None
    console.print(engine.report(task) if adapted else "  nothing: all parameters are trained")
    console.print(memory_table(exercise.source, method, RANK))
    with phase(console, "Answers of the base"):
        base_answers = answers(trainer, task, data, exercise)
    console.print(f"Training {exercise.steps} steps; Ctrl-C ends it and keeps what there is.")
    begun = time.perf_counter()
    trainer.fit(task, data.loader("train"))
    trained_seconds = time.perf_counter() - begun
    if interruption.saved is not None:
        console.print(f"Ended after {trainer.global_step} steps: {interruption.saved}")
    with phase(console, "Evaluating the tuned model") as end_spinner:
        after = measure(trainer, task, data, exercise, end_spinner)
    with phase(console, "Answers of the tuned model"):
        tuned_answers = answers(trainer, task, data, exercise)
    record = {
        "model": exercise.title if model is None or exercise.title == "shipped base" else model,
        "method": method,
        "seed": seed,
        "steps": trainer.global_step,
        "learning_rate": rate,
        "seconds": round(time.perf_counter() - started, 1),
        "training_seconds": round(trained_seconds, 1),
        "held_out_loss": [before.held_out, after.held_out],
        **({} if before.train is None else {"train_loss": [before.train, after.train]}),
        **judged(exercise, base_answers, tuned_answers),
    }
    (folder / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    show_result(console, record, folder, method)
    return record


def judged(exercise: Exercise, base: list[str], tuned: list[str]) -> dict[str, Any]:
    """Returns the held-out answers that are shown, and how many of all are right."""
    rows = exercise.held_out()
    places = list(exercise.answered)
    found: dict[str, Any] = {
        "samples": [
            {
                "question": rows[place][0],
                "reference": rows[place][1],
                "base": base[places.index(place)],
                "tuned": tuned[places.index(place)],
            }
            for place in exercise.shown
        ]
    }
    if exercise.exact is not None:
        expected = [rows[place][1] for place in places]
        right = [sum(map(exercise.exact, answers, expected)) for answers in (base, tuned)]
        found |= {"exact": right, "answered": len(places)}
    return found


def quiet() -> None:
    """Keeps libraries from talking between the demo's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(pytorch_lightning|lightning|torch)[.]")


def make_trainer(lightning: Any, method: str, steps: int, folder: Path) -> tuple[Any, Any]:
    """Returns the Trainer, and its callback for Ctrl-C.

    The strategy is all that differs between the methods.
    """
    strategies = {"qlora": QLoRAStrategy, "lora": LoRAStrategy}
    strategy: Any = "auto"
    if method in strategies:
        cls = bind_to_lightning(strategies[method], lightning.__name__)
        # Nothing here is short of memory, and computing activations twice takes time.
        strategy = cls(r=RANK, announce=False, optimizer=None, gradient_checkpointing=False)
    checkpoint = lightning.callbacks.ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="demo", enable_version_counter=False
    )
    interruption = bind_to_lightning(SaveOnInterrupt, lightning.__name__)()
    trainer = lightning.Trainer(
        strategy=strategy,
        max_steps=steps,
        devices=1,
        default_root_dir=folder,
        callbacks=[checkpoint, interruption, progress_callback(lightning, steps)],
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    return trainer, interruption


def measure(
    trainer: Any, task: Any, data: Any, exercise: Exercise, end_spinner: Callable[[], None]
) -> Losses:
    """Returns the loss on all held-out rows and, for the toy, on 200 training rows."""
    callbacks = import_module(namespace_in_use()).callbacks
    # Before the progress bar, which takes its place.
    trainer.callbacks.insert(
        0, callbacks.LambdaCallback(on_validation_start=lambda *_: end_spinner())
    )
    train = None
    if exercise.exact is None:
        rows = data.rows("train")
        some = DataLoader(
            rows.select(range(min(200, len(rows)))), data.batch_size, collate_fn=data.collator()
        )
        train = trainer.validate(task, some, verbose=False)[0]["val_loss"]
    # Last, since answers are those of the data module that the Trainer has.
    return Losses(train, trainer.validate(task, datamodule=data, verbose=False)[0]["val_loss"])


def answers(trainer: Any, task: Any, data: Any, exercise: Exercise) -> list[str]:
    """Returns greedy answers to held-out rows, one line each."""
    # Lightning leaves it on the CPU.
    task.to(trainer.strategy.root_device)
    rows = data.rows("validation")
    chosen = [rows[place] for place in exercise.answered]
    samples = task.generate_samples(chosen, exercise.new_tokens)
    return [" ".join(sample.generated.split()) for sample in samples]


def memory_table(source: str, method: str, rank: int) -> Table:
    """Returns weights, gradients and optimizer states of the three methods, side by side."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(engine.load_config(source), dtype=torch.float32)
    model.tie_weights()
    table = Table(title="memory without activations, in MB", title_justify="left")
    for column in ("method", "trained", "weights", "gradients", "Adam", "total", "of full"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = static_memory(model, rank)
    for row in rows:
        table.add_row(
            row.method,
            f"{row.trainable:,}",
            *(f"{v / 1e6:.1f}" for v in (row.weights, row.gradients, row.optimizer, row.total)),
            f"{row.total / rows[0].total:.0%}",
            style="bold" if row.method == method else None,
        )
    return table


def show_result(console: Console, record: dict[str, Any], folder: Path, method: str) -> None:
    """Prints losses, answers, files and what to try next."""
    table = Table(title="before and after", title_justify="left")
    for column in ("", "base", "tuned", "change"):
        table.add_column(column, justify="right" if column else "left")
    losses = (("loss of training rows", "train_loss"), ("loss of held-out rows", "held_out_loss"))
    for name, key in losses:
        if key in record:
            old, new = record[key]
            table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{(new - old) / old:+.0%}")
    if "exact" in record:
        old, new = record["exact"]
        total = record["answered"]
        name = "held-out orders exactly right"
        table.add_row(name, f"{old} of {total}", f"{new} of {total}", f"{new - old:+d}")
    console.print(table)
    console.print("[bold]Held-out questions, answered[/bold]")
    for sample in record["samples"]:
        console.print(f"\n  [bold]{escape(sample['question'])}[/bold]")
        console.print(f"  base      {escape(sample['base'][:200])}")
        console.print(f"  tuned     [green]{escape(sample['tuned'][:200])}[/green]")
        console.print(f"  expected  [dim]{escape(sample['reference'][:200])}[/dim]")
    seconds, training = record["seconds"], record["training_seconds"]
    console.print(f"\n[bold]Files[/bold] ({seconds:.0f} s in all, {training:.0f} s of training)")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        console.print(f"  {file}  {file.stat().st_size / 1e3:,.0f} kB", highlight=False)
    other = "lora" if method == "qlora" else "qlora"
    console.print("\n[bold]Next[/bold]")
    chat = () if method == "full" else (f"lightning-peft chat {folder}/checkpoints/adapters/demo",)
    for line in (
        f"lightning-peft demo --method {other}",
        *chat,
        "Trainer(strategy=QLoRAStrategy())   # your own module",
    ):
        console.print(f"  {line}", highlight=False)


class ProgressLines(LateBoundCallback):
    """Prints a line at every tenth of the run."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.started = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Prints step, loss and the time left, ten times."""
        step = trainer.global_step
        if step and step % max(1, self.steps // 10) == 0:
            spent = time.perf_counter() - self.started
            left = spent / step * (self.steps - step)
            loss = float(trainer.callback_metrics["train_loss"])
            print(
                f"  step {step}/{self.steps}  loss {loss:.3f}  {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )


def progress_callback(lightning: Any, steps: int) -> Any:
    """Returns Lightning's rich bar on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        return lightning.callbacks.RichProgressBar(leave=True)
    return ProgressLines(steps)

"""The demo: a tiny language model learns to answer questions, with every number shown."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
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
from lightning_peft.data.supervised import SupervisedData
from lightning_peft.data.tokenized import load_tokenizer
from lightning_peft.demo.progress import progress_callback
from lightning_peft.errors import ConfigError, first_line
from lightning_peft.plan.memory import static_memory
from lightning_peft.plugin.namespace import bind_to_lightning, namespace_in_use
from lightning_peft.plugin.strategies import LoRAStrategy, QLoRAStrategy
from lightning_peft.tasks.causal_lm import CausalLM

BASE = Path(__file__).with_name("base")
INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
# As the shipped base reads questions.
TEMPLATE = (
    "### Question:\n{{ messages[0].content }}\n\n### Answer:\n"
    "{% if not add_generation_prompt %}{{ messages[1].content + eos_token }}{% endif %}"
)
STEPS = 240
BATCH_SIZE = 16
RANK = 16
# Measured on the shipped base; larger models want the usual 2e-4.
LEARNING_RATES = {"qlora": 2e-3, "lora": 2e-3, "full": 5e-4}
SAMPLES = 3
NEW_TOKENS = 48


@dataclass
class Losses:
    """Mean loss per answer token, in nats."""

    train: float
    held_out: float


def run_demo(
    model: str | None = None,
    method: str = "qlora",
    seed: int = 0,
    steps: int | None = None,
    learning_rate: float | None = None,
    output: str = "demo-output",
) -> dict[str, Any]:
    """Runs the demo and returns its result record; see ``lightning-peft demo --help``.

    Raises:
        ConfigError: If the model is neither a folder nor can be had from the hub.
    """
    console = Console()
    lightning = import_module(namespace_in_use())
    quiet()
    lightning.seed_everything(seed, verbose=False)
    source = model or str(BASE)
    check_source(source)
    rate = learning_rate or (LEARNING_RATES[method] if model is None else 2e-4)
    console.print(Panel(introduction(model, method), title="lightning-peft demo", expand=False))
    folder = Path(output)
    data = demo_data(source, BATCH_SIZE, folder / "data")
    task = CausalLM(source, learning_rate=rate, dtype="float32")
    trainer = make_trainer(lightning, method, steps or STEPS, folder)
    started = time.perf_counter()
    before = measure(trainer, task, data)
    console.print("[bold]What is adapted and quantized[/bold]")
    adapted = engine.record_of(task) is not None
    console.print(engine.report(task) if adapted else "  nothing: all parameters are trained")
    console.print(memory_table(source, method))
    questions = sample_questions()
    base_answers = answers(task, data, questions)
    trainer.fit(task, data.loader("train"))
    after = measure(trainer, task, data)
    tuned_answers = answers(task, data, questions)
    seconds = time.perf_counter() - started
    record = {
        "model": source if model else "shipped base",
        "method": method,
        "seed": seed,
        "steps": trainer.global_step,
        "learning_rate": rate,
        "seconds": round(seconds, 1),
        "train_loss": [before.train, after.train],
        "held_out_loss": [before.held_out, after.held_out],
        "samples": [
            {"question": q["prompt"], "reference": q["response"], "base": b, "tuned": t}
            for q, b, t in zip(questions, base_answers, tuned_answers, strict=True)
        ],
    }
    (folder / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    show_result(console, record, folder, method)
    return record


def quiet() -> None:
    """Keeps libraries from talking between the demo's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(pytorch_lightning|lightning|torch)[.]")


def check_source(source: str) -> None:
    """Tries the model's configuration before anything else.

    Raises:
        ConfigError: If it cannot be had.
    """
    try:
        import_module("transformers").AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"--model {source!r} is not a folder with a transformers model, and the hub did not "
            f"give it ({reason}). Check the name and the network (HF_HUB_OFFLINE must not be set), "
            "or leave --model out for the base that comes with the package."
        ) from error


def introduction(model: str | None, method: str) -> str:
    """Returns the description of the demo."""
    title = {"qlora": "QLoRA", "lora": "LoRA", "full": "Full fine-tuning"}[method]
    if model is not None:
        return f"{title} of {escape(model)} on questions about the Python standard library."
    record = json.loads((BASE / "training_record.json").read_text())
    return (
        f"{title} of a tiny Llama ({record['parameters'] / 1e6:.1f} million parameters) that has "
        "read the documentation of Python's standard library and nothing else. It is a toy: watch "
        "what tuning changes, do not rely on its answers."
    )


def demo_data(source: str, batch_size: int, folder: Path) -> SupervisedData:
    """Returns the questions and answers, encoded for ``source`` and kept in ``folder``."""
    # A template writes the token that a tokenizer begins texts with only where it says so.
    tokenizer = load_tokenizer(source)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    options: dict[str, Any] = {"max_length": 256, "over_long": "truncate", "duplicates": "keep"}
    options["cache_dir"] = str(folder)
    template = ("{{ bos_token }}" if begins else "") + TEMPLATE
    return SupervisedData(
        str(INSTRUCTIONS), source, chat_template=template, batch_size=batch_size, **options
    )


def make_trainer(lightning: Any, method: str, steps: int, folder: Path) -> Any:
    """Returns the Trainer; the strategy is all that differs between the methods."""
    strategies = {"qlora": QLoRAStrategy, "lora": LoRAStrategy}
    strategy: Any = "auto"
    if method in strategies:
        cls = bind_to_lightning(strategies[method], lightning.__name__)
        # A toy has no memory to save, and computing activations twice takes time.
        strategy = cls(r=RANK, announce=False, optimizer=None, gradient_checkpointing=False)
    checkpoint = lightning.callbacks.ModelCheckpoint(
        dirpath=folder / "checkpoints", filename="demo", enable_version_counter=False
    )
    return lightning.Trainer(
        strategy=strategy,
        max_steps=steps,
        devices=1,
        default_root_dir=folder,
        callbacks=[checkpoint, progress_callback(lightning, steps)],
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )


def measure(trainer: Any, task: Any, data: Any) -> Losses:
    """Returns the loss on 200 training rows and on all held-out rows."""
    rows = data.rows("train")
    some = DataLoader(
        rows.select(range(min(200, len(rows)))), data.batch_size, collate_fn=data.collator()
    )
    return Losses(
        *(
            trainer.validate(task, loader, verbose=False)[0]["val_loss"]
            for loader in (some, data.loader("validation"))
        )
    )


def sample_questions() -> list[dict[str, str]]:
    """Returns the held-out questions that are answered aloud, spread over the file."""
    rows = [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["split"] == "validation"]
    return [rows[(2 * i + 1) * len(rows) // (2 * SAMPLES)] for i in range(SAMPLES)]


@torch.no_grad()
def answers(task: Any, data: Any, questions: list[dict[str, str]]) -> list[str]:
    """Returns greedy answers, one line each."""
    tokenizer = data.tokenizer
    was_training = task.training
    task.eval()
    texts = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question["prompt"]}],
            chat_template=data.hparams["chat_template"],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = task.model.generate(
            input_ids=inputs["input_ids"].to(task.device),
            attention_mask=inputs["attention_mask"].to(task.device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(" ".join(text.split()))
    task.train(was_training)
    return texts


def memory_table(source: str, method: str) -> Table:
    """Returns weights, gradients and optimizer states of the three methods, side by side."""
    config = import_module("transformers").AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    table = Table(title="memory without activations, in MB", title_justify="left")
    for column in ("method", "trained", "weights", "gradients", "Adam", "total", "of full"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = static_memory(model, RANK)
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
    table = Table(title="loss per answer token (lower is better)", title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in (("training rows", "train_loss"), ("held-out rows", "held_out_loss")):
        old, new = record[key]
        table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{(new - old) / old:+.0%}")
    console.print(table)
    console.print("[bold]Held-out questions, answered[/bold]")
    for sample in record["samples"]:
        console.print(f"\n  [bold]{escape(sample['question'])}[/bold]")
        console.print(f"  base   {escape(sample['base'][:200])}")
        console.print(f"  tuned  [green]{escape(sample['tuned'][:200])}[/green]")
        console.print(f"  docs   [dim]{escape(sample['reference'][:200])}[/dim]")
    console.print(f"\n[bold]Files[/bold] ({record['seconds']:.0f} s in all)")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        console.print(f"  {file}  {file.stat().st_size / 1e3:,.0f} kB", highlight=False)
    other = "lora" if method == "qlora" else "qlora"
    console.print("\n[bold]Next[/bold]")
    for line in (
        f"lightning-peft demo --method {other}",
        "lightning-peft demo --model HuggingFaceTB/SmolLM2-135M   # needs the network",
        "Trainer(strategy=QLoRAStrategy())                        # your own module",
    ):
        console.print(f"  {line}", highlight=False)

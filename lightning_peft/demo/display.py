"""Output of the demo: memory by method, and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM

from lightning_peft import engine
from lightning_peft.plan.memory import static_memory


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

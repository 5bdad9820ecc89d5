"""Measured peak memory of training steps and the predictions of the planner, over a grid of runs.

``python benchmarks/planner_grid.py measure [--device cuda] [--only TEXT]`` trains every row of the
grid for two optimizer steps, each in a process of its own, through the real Trainer and strategy,
and writes ``planner_grid_DEVICE.json`` with the conditions. The peak is that of the second step, in
bytes of torch's allocator: on the CPU from the profiler's record of every allocation since before
the model was built, on a GPU from ``torch.cuda.max_memory_allocated``.

``python benchmarks/planner_grid.py table`` predicts every recorded row again and writes the table
into ``docs/planner.md``; the published figures there are those of ``planner_anchors.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from allocations import memory_events
from profiles import torch_profiler
from record import QUIET, device_name, markdown, run_script, write_between

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "planner.md"
PACKAGES = ("torch", "pytorch-lightning", "transformers", "peft", "bitsandbytes")

SIZES: dict[str, dict[str, Any]] = {
    "llama-5M": {
        "kind": "llama", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "llama-27M": {
        "kind": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "llama-wide": {
        "kind": "llama", "vocab_size": 32768, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "gpt2-10M": {
        "kind": "gpt2", "vocab_size": 8192, "hidden_size": 320, "num_hidden_layers": 6,
        "num_attention_heads": 8, "max_position_embeddings": 1024,
    },
    "vit-6M": {
        "kind": "vit", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 8, "image_size": 96, "patch_size": 8,
    },
}  # fmt: skip


def grid() -> list[dict[str, Any]]:
    """Returns the rows: first the full cross of five factors, then one change at a time."""
    rows: list[dict[str, Any]] = [
        {"model": model, "method": method, "batch_size": b, "seq_len": s,
         "gradient_checkpointing": checkpointing}
        for model in ("llama-5M", "llama-27M")
        for method in ("full", "lora", "qlora")
        for b, s in ((1, 512), (4, 128), (8, 256))
        for checkpointing in (False, True)
    ]  # fmt: skip
    base = {
        "model": "llama-27M", "batch_size": 4, "seq_len": 256, "gradient_checkpointing": False
    }  # fmt: skip
    for method in ("full", "lora", "qlora"):
        for change in (
            {"precision": "bf16-mixed"},
            {"precision": "bf16-true"},
            {"accumulate": 2},
            {"model": "gpt2-10M"},
            {"model": "vit-6M", "seq_len": 1},
        ):
            rows.append({**base, "method": method, **change})
    for method in ("lora", "qlora"):
        rows.append({**base, "method": method, "lora": {"r": 64}})
    rows.append({**base, "method": "lora", "optimizer": "adamw_8bit"})
    rows.append({**base, "method": "qlora", "optimizer": "paged_adamw_8bit"})
    # Logits four times as large as a chunk of them, in the task of the recipes and without it.
    wide = {"model": "llama-wide", "batch_size": 4, "seq_len": 512}
    for method, logits, checkpointing in (
        ("full", "chunked", False),
        ("lora", "chunked", False),
        ("lora", "chunked", True),
        ("qlora", "chunked", False),
        ("qlora", "chunked", True),
        ("qlora", "all", True),
    ):
        rows.append(
            {**wide, "method": method, "logits": logits, "gradient_checkpointing": checkpointing}
        )
    return rows


def config_of(model: str) -> Any:
    """Returns the transformers config of one of the sizes."""
    import transformers

    fields = dict(SIZES[model])
    kind = fields.pop("kind")
    config: Any = transformers.AutoConfig.for_model(kind, **fields)
    config.architectures = {
        "llama": ["LlamaForCausalLM"],
        "gpt2": ["GPT2LMHeadModel"],
        "vit": ["ViTForImageClassification"],
    }[kind]
    config.dtype = "float32"
    return config


def settings_of(row: dict[str, Any], device: str) -> Any:
    """Returns the planner's settings for a row."""
    from lightning_peft.plan.settings import PlanSettings

    fields = {key: value for key, value in row.items() if key in PlanSettings.__dataclass_fields__}
    # What `train` configures: torch's own, unless the strategy puts another in its place.
    if row["method"] != "qlora":
        fields.setdefault("optimizer", "adamw_torch")
    return PlanSettings(**fields, device=device)


def predict(row: dict[str, Any], device: str) -> int:
    """Returns the predicted peak of a row, in bytes."""
    from lightning_peft.plan.prediction import predict as planned
    from lightning_peft.plan.sources import from_config
    from lightning_peft.tasks.token_loss import chunked_loss

    step = chunked_loss if row.get("logits") == "chunked" else None
    source = from_config(config_of(row["model"]))
    return planned(source, settings_of(row, device), step).allocated


def batches_of(row: dict[str, Any], config: Any, count: int) -> list[dict[str, Any]]:
    """Returns ``count`` batches of random values; in those with several rows, some are padded."""
    import torch

    rows, length = row["batch_size"], row["seq_len"]
    if config.model_type == "vit":
        images = torch.randn(count, rows, 3, config.image_size, config.image_size)
        return [{"pixel_values": i, "labels": torch.zeros(rows, dtype=torch.long)} for i in images]
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, length - length // 4 :] = 0
    made = []
    for _ in range(count):
        ids = torch.randint(0, config.vocab_size, (rows, length))
        labels = ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": ids, "attention_mask": mask.clone(), "labels": labels})
    return made


def train(row: dict[str, Any], device: str) -> dict[str, Any]:
    """Trains one row in this process; returns the measured bytes."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    from lightning_peft import LoRAStrategy, QLoRAStrategy

    torch.manual_seed(0)
    config, full = config_of(row["model"]), row["method"] == "full"
    checkpointing, accumulate = row["gradient_checkpointing"], row.get("accumulate", 1)
    meter = Meter(device, accumulate)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            import transformers

            self.model = getattr(transformers, config.architectures[0])(config)
            self.model.train()
            if full and checkpointing:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
                self.model.config.use_cache = False

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    def recipe() -> Any:
        from lightning_peft.plugin.namespace import bind_to_lightning
        from lightning_peft.tasks.causal_lm import CausalLM

        fields = {**config.to_diff_dict(), "model_type": config.model_type}
        return bind_to_lightning(CausalLM, "pytorch_lightning")(
            "random", dtype="float32", config=fields
        )

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            meter.before(index)

    kwargs: dict[str, Any] = {**row.get("lora", {}), "announce": False}
    if "optimizer" in row:
        kwargs["optimizer"] = row["optimizer"]
    kinds = {"lora": LoRAStrategy, "qlora": QLoRAStrategy}
    with meter:
        trainer = pl.Trainer(
            strategy="auto" if full else kinds[row["method"]](
                gradient_checkpointing=checkpointing, **kwargs
            ),
            accelerator="gpu" if device == "cuda" else "cpu",
            precision=row.get("precision", "32-true"),
            max_steps=2,
            accumulate_grad_batches=accumulate,
            callbacks=[Watch()],
            **QUIET,
        )  # fmt: skip
        batches = batches_of(row, config, 2 * accumulate)
        task = recipe() if row.get("logits") == "chunked" else Task()
        trainer.fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return {"measured": meter.peak}


class Meter:
    """Measures the peak of the second optimizer step, in bytes of torch's allocator."""

    def __init__(self, device: str, accumulate: int) -> None:
        self.device, self.first = device, accumulate
        self.peak = 0
        self._profile: Any = None
        self._mark: Any = None

    def __enter__(self) -> None:
        if self.device == "cpu":
            self._profile = torch_profiler(profile_memory=True)
            self._profile.__enter__()

    def before(self, index: int) -> None:
        """Called before each batch."""
        import torch

        if index != self.first:
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._mark = torch.profiler.record_function("second step")
            self._mark.__enter__()

    def __exit__(self, *error: object) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._mark.__exit__(None, None, None)
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        start = next(e.start_ns() for e in events if e.name() == "second step")
        live = 0
        for when, size in memory_events(self._profile):
            live += size
            if when >= start:
                self.peak = max(self.peak, live)


def measure(device: str, only: str) -> None:
    """Runs the grid and writes the records after every row."""
    file = HERE / f"planner_grid_{device}.json"
    rows = [row for row in grid() if only in json.dumps(row)]
    done: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        words = ("one", "--device", device, "--row", json.dumps(row))
        record = {**row, **run_script(__file__, *words)}
        done.append(record)
        print(f"{number}/{len(rows)} {json.dumps(record)}", file=sys.stderr, flush=True)
        if not only:
            content = {"conditions": conditions(device), "rows": done}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def conditions(device: str) -> dict[str, Any]:
    """Returns the conditions of the measurement."""
    where = device_name(device) + ("" if device == "cuda" else f", {platform.machine()}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return {"device": where, "threads": threads, "python": platform.python_version(), **versions}


def records(device: str) -> dict[str, Any]:
    """Returns the record: measurements and conditions."""
    file = HERE / f"planner_grid_{device}.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def errors(rows: list[dict[str, Any]], device: str) -> list[float]:
    """Returns predicted over measured, minus one, for each record."""
    return [predict(row, device) / row["measured"] - 1 for row in rows]


def table(device: str) -> str:
    """Returns the predicted and the measured peaks as a table with its conditions."""
    content = records(device)
    rows, versions = content["rows"], content["conditions"]
    off = errors(rows, device)
    lines = [
        f"{len(rows)} runs, median error {statistics.median(map(abs, off)):.2%}, worst "
        f"{min(off):+.1%} and {max(off):+.1%}. "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
        + ".",
        "",
    ]
    cells = []
    for row, error in zip(rows, off, strict=True):
        known = ("model", "method", "batch_size", "seq_len", "gradient_checkpointing", "measured")
        further = {key: value for key, value in row.items() if key not in known}
        settings = ", ".join(f"{key} {value}" for key, value in further.items())
        image = row["model"].startswith("vit")
        measured = row["measured"]
        cells.append(
            [
                row["model"],
                row["method"],
                row["batch_size"],
                "-" if image else row["seq_len"],
                "on" if row["gradient_checkpointing"] else "off",
                settings.replace("{", "").replace("}", "").replace("'", ""),
                f"{measured * (1 + error) / 1e6:.1f}",
                f"{measured / 1e6:.1f}",
                f"{error:+.2%}",
            ]
        )
    columns = "model | method | batch | length | checkpointing | else | predicted MB | measured MB"
    return "\n".join([*lines, *markdown(f"{columns} | error", cells)])


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table", "one"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="rows that contain this text; nothing is kept")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command == "one":
        print(json.dumps(train(json.loads(given.row), given.device)))
    elif given.command == "measure":
        measure(given.device, given.only)
    else:
        write_between(f"{given.device} table", table(given.device), PAGE)


if __name__ == "__main__":
    main()

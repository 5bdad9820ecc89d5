"""What ``sharding="fsdp2"`` leaves in each of 1, 2 and 4 processes.

``python benchmarks/sharding.py`` trains a random Llama for three steps on CPU processes (gloo) with
a base of NF4 and with one of bfloat16, and counts the bytes of what each process holds between two
steps. It loads another one in several ways, and measures the peak of each process until training
starts: of anonymous memory, where memory-mapped files are not counted, above what it had before
``fit``. ``benchmarks/records/sharding.json`` and its tables in ``docs/devices.md`` are written.
``--quick`` takes smaller models and writes no table. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loading_memory import write_model
from record import QUIET, conditions, format_conditions, markdown, write, write_between

PAGE = Path(__file__).parents[1] / "docs" / "devices.md"
COUNTS = (1, 2, 4)
METHODS = ("qlora", "lora")
# Building method and dtype of the base; the file has bfloat16.
WAYS = {
    "NF4, `configure_model`": ("qlora", "bfloat16", False, False),
    "NF4, `configure_model`, cast": ("qlora", "float32", False, False),
    "NF4, `configure_model`, cache": ("qlora", "bfloat16", False, True),
    "NF4, constructor": ("qlora", "bfloat16", True, False),
    "NF4, constructor, cast": ("qlora", "float32", True, False),
    "bfloat16, `configure_model`": ("lora", "bfloat16", False, False),
    "bfloat16, `configure_model`, cast": ("lora", "float32", False, False),
}
LAYERS = {False: 16, True: 1}
SIZES = {
    False: {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    True: {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
}


def held_bytes(module: Any, optimizer: Any) -> dict[str, int]:
    """Returns the bytes of the storages of this process, by what they are for."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    local = [p.to_local() if hasattr(p, "to_local") else p.data for p in frozen]
    quantized = [layer for layer in module.modules() if hasattr(layer, "quantization_keys")]
    for layer in quantized:
        if layer.packed is None:
            local += layer.backend.constants(layer.stored_weight())
    tables = [
        table
        for layer in quantized
        for table in layer.backend.tables(
            layer.stored_weight() if layer.packed is None else layer.packed.template
        )
    ]
    states = [value for state in optimizer.state.values() for value in state.values()]
    trained = [p.data for p in module.parameters() if p.requires_grad]
    return {
        "frozen": _bytes(local),
        "tables": _bytes(tables),
        "adapters": _bytes(trained),
        "optimizer": _bytes(states),
    }


def _bytes(tensors: list[Any]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def task_class() -> Any:
    """Returns the class of a task that trains ``self.model`` on rows of tokens."""
    import pytorch_lightning as pl
    import torch

    class Task(pl.LightningModule):
        model: Any

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Task


def trainer_of(count: int, method: str, own: dict[str, Any] | None = None, **given: Any) -> Any:
    """Returns the Trainer of ``count`` processes; ``own`` are settings of the strategy."""
    import pytorch_lightning as pl

    import lightning_peft

    classes = {"lora": lightning_peft.LoRAStrategy, "qlora": lightning_peft.QLoRAStrategy}
    strategy = classes[method](sharding="fsdp2", announce=False, **(own or {}))
    settings = {**QUIET, "devices": count, "accelerator": "cpu"}
    return pl.Trainer(strategy=strategy, **settings, **given)


def of_all(count: int, mine: dict[str, int]) -> list[Any]:
    """Returns the findings of all processes."""
    import torch

    found: list[Any] = [mine] * count
    if count > 1:
        torch.distributed.all_gather_object(found, mine)
    return found


def train(count: int, method: str, quick: bool, target: Path) -> None:
    """Trains in ``count`` processes, of which this is one; the first writes what each holds."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, num_attention_heads=8, max_position_embeddings=64, **SIZES[quick]
        )
    ).to(torch.bfloat16)
    held: list[Any] = []

    class Task(task_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def on_train_end(self) -> None:
            held[:] = of_all(count, held_bytes(self, self.optimizers(use_pl_optimizer=False)))

    rows = torch.randint(4096, (3 * count, 16), generator=torch.Generator().manual_seed(1))
    trainer = trainer_of(count, method, max_epochs=1, precision="bf16-mixed")
    trainer.fit(Task(), DataLoader(rows, batch_size=1))
    if trainer.is_global_zero:
        target.write_text(json.dumps(held), encoding="utf-8")


def load(count: int, way: str, folder: str, target: Path) -> None:
    """Loads in ``count`` processes, of which this is one; the first writes what each took."""
    import torch
    from loading_memory import PeakMemory, memory
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    import lightning_peft
    from lightning_peft.engine.loading import quantized_cache

    # Loaded on first use otherwise, which is not part of loading weights.
    assert lightning_peft.engine.inject
    assert modeling_llama
    assert torch.distributed.fsdp.fully_shard
    quantized_cache.SMALLEST = 0
    method, dtype, in_constructor, cached = WAYS[way]
    taken: list[Any] = []

    class Task(task_class()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None
            if in_constructor:
                self.build()

        def build(self) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

        def configure_model(self) -> None:
            if self.model is None:
                self.build()

        def on_train_start(self) -> None:
            after = memory("RssAnon") - before
            taken[:] = of_all(count, {"peak": watched.peak["RssAnon"], "after": after})

    own = {"r": 1, **({"cache_quantized_base": cached} if method == "qlora" else {})}
    rows = torch.zeros(count, 4, dtype=torch.long)
    trainer = trainer_of(count, method, own, max_steps=1)
    before = memory("RssAnon")
    with PeakMemory() as watched:
        trainer.fit(Task(), DataLoader(rows, batch_size=1))
    if trainer.is_global_zero:
        target.write_text(json.dumps(taken), encoding="utf-8")


def measure_loading(quick: bool) -> dict[str, Any]:
    """Returns the memory that each of the processes takes to load, and the size of the model."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        sizes = write_model(model, LAYERS[quick], "bfloat16")
        os.environ["XDG_CACHE_HOME"] = folder
        # A file that is two seconds old has its hash remembered.
        time.sleep(3)
        taken = {}
        for way in WAYS:
            # One process fills the cache.
            for count in COUNTS if "cache" not in way else (1, *COUNTS):
                taken[f"{way} {count}"] = run(count, quick, "--way", way, "--folder", str(model))
    return {"layers": LAYERS[quick], "bytes": sizes, "taken": taken}


def run(count: int, quick: bool, *words: str) -> list[dict[str, int]]:
    """Returns the report of each of ``count`` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "held.json"
        own = ["--processes", str(count), "--target", str(target), *(["--quick"] if quick else [])]
        process = subprocess.Popen(
            [sys.executable, __file__, *own, *words],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=900)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if code:
            raise SystemExit(f"{' '.join(words)} in {count} processes: exit code {code}")
        found: list[dict[str, int]] = json.loads(target.read_text(encoding="utf-8"))
        return found


def table(record: dict[str, Any]) -> str:
    """Returns the table of a record."""
    rows = []
    for method in METHODS:
        whole = record["held"][f"{method} 1"][0]["frozen"]
        for count in COUNTS:
            held = record["held"][f"{method} {count}"]
            most = max(one["frozen"] for one in held)
            rows.append(
                [
                    {"qlora": "NF4", "lora": "bfloat16"}[method],
                    count,
                    f"{most:,}",
                    f"{most * count / whole:.3f}",
                    f"{held[0]['tables']:,}",
                    f"{held[0]['adapters']:,}",
                    f"{held[0]['optimizer']:,}",
                ]
            )
    header = (
        "base | processes | frozen bytes, largest process | times N, of the whole | code tables | "
        "adapters | optimizer"
    )
    return "\n".join([*markdown(header, rows), "", format_conditions(record["conditions"])])


def _peak(taken: list[dict[str, int]] | None) -> str:
    return f"{max(one['peak'] for one in taken) / 1e6:,.0f}" if taken else "not measured"


def loading_table(record: dict[str, Any]) -> str:
    """Returns the table of what loading takes."""
    loading = record["loading"]
    rows = [
        [
            way,
            *(_peak(loading["taken"].get(f"{way} {count}")) for count in COUNTS),
        ]
        for way in WAYS
    ]
    header = "base, and where it is built | " + " | ".join(f"{n}, MB" for n in COUNTS)
    sizes = ", ".join(
        f"{loading['bytes'][size] / 1e6:,.0f} MB {what}"
        for size, what in (
            ("16_bit", "in bfloat16"),
            ("largest_tensor", "of it in the largest tensor"),
            ("4_bit", "for the linear layers in NF4"),
        )
    )
    return "\n".join([f"The model has {sizes}.", "", *markdown(header, rows)])


def main() -> None:
    """Measures all, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder")
    parser.add_argument("--target", type=Path)
    given = parser.parse_args()
    if given.way:
        load(given.processes, given.way, given.folder, given.target)
        return
    if given.processes:
        train(given.processes, given.method, given.quick, given.target)
        return
    record = {
        "conditions": conditions(),
        "model": SIZES[given.quick],
        "held": {f"{m} {n}": run(n, given.quick, "--method", m) for m in METHODS for n in COUNTS},
        "loading": measure_loading(given.quick),
    }
    write("sharding", record, quick=given.quick)
    if not given.quick:
        write_between("sharding", table(record), PAGE)
        write_between("loading", loading_table(record), PAGE)


if __name__ == "__main__":
    main()

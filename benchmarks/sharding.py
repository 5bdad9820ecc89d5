"""What ``sharding="fsdp2"`` leaves in each of 1, 2 and 4 processes.

``python benchmarks/sharding.py`` trains a random Llama for three steps on CPU processes (gloo) with
a base of NF4 and with one of bfloat16, counts the bytes of what each process holds between two
steps, and writes ``benchmarks/records/sharding.json`` and its table in ``docs/devices.md``.
``--quick`` takes a smaller model and writes no table. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import QUIET, conditions, format_conditions, markdown, write, write_between

PAGE = Path(__file__).parents[1] / "docs" / "devices.md"
COUNTS = (1, 2, 4)
METHODS = ("qlora", "lora")
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


def train(count: int, method: str, quick: bool, target: Path) -> None:
    """Trains in ``count`` processes, of which this is one; the first writes what each holds."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader
    from transformers import LlamaConfig, LlamaForCausalLM

    import lightning_peft

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, num_attention_heads=8, max_position_embeddings=64, **SIZES[quick]
        )
    ).to(torch.bfloat16)
    held: list[Any] = []

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_train_end(self) -> None:
            mine = held_bytes(self, self.optimizers(use_pl_optimizer=False))
            held[:] = [mine] * count
            if count > 1:
                torch.distributed.all_gather_object(held, mine)

    classes = {"lora": lightning_peft.LoRAStrategy, "qlora": lightning_peft.QLoRAStrategy}
    ours = classes[method](sharding="fsdp2", announce=False)
    rows = torch.randint(4096, (3 * count, 16), generator=torch.Generator().manual_seed(1))
    settings = {**QUIET, "devices": count, "accelerator": "cpu", "max_epochs": 1}
    run = pl.Trainer(strategy=ours, precision="bf16-mixed", **settings)
    run.fit(Task(), DataLoader(rows, batch_size=1))
    if run.is_global_zero:
        target.write_text(json.dumps(held), encoding="utf-8")


def measure(count: int, method: str, quick: bool) -> list[dict[str, int]]:
    """Returns the bytes that each of ``count`` fresh processes holds."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "held.json"
        words = ["--processes", str(count), "--method", method, "--target", str(target)]
        process = subprocess.Popen(
            [sys.executable, __file__, *words, *(["--quick"] if quick else [])],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=900)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if code:
            raise SystemExit(f"{method} in {count} processes: exit code {code}")
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


def main() -> None:
    """Measures all, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--method", choices=METHODS, default="qlora")
    parser.add_argument("--target", type=Path)
    given = parser.parse_args()
    if given.processes:
        train(given.processes, given.method, given.quick, given.target)
        return
    held = {f"{m} {n}": measure(n, m, given.quick) for m in METHODS for n in COUNTS}
    record = {"conditions": conditions(), "model": SIZES[given.quick], "held": held}
    write("sharding", record, quick=given.quick)
    if not given.quick:
        write_between("sharding", table(record), PAGE)


if __name__ == "__main__":
    main()

"""Tests that need a GPU, and loading of a base from disk."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ladder import SIZES, memory
from record import QUIET
from run import HERE, Kit

ROOT = HERE.parents[1]
# The files with tests marked gpu: collecting all others takes longer than these.
FILES = (
    "doctor/test_hardware.py", "doctor/test_training.py", "engine/test_initialization.py",
    "engine/test_optimizers.py", "engine/test_quantization.py", "plugin/test_traps.py",
)  # fmt: skip


def tests(kit: Kit) -> None:
    """Runs the tests marked gpu; without one they are skipped, which the record says."""

    def measure() -> dict[str, Any]:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        files = [str(ROOT / "tests" / name) for name in FILES[: 1 if kit.tiny else None]]
        done = subprocess.run(
            [*words, *files], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        return {"code": done.returncode, "last": done.stdout.strip().splitlines()[-20:]}

    kit.row("tests", "pytest -m gpu", 90, measure)


def loading(kit: Kit) -> None:
    """Loads a base from disk: as transformers does with bitsandbytes, and as QLoRAStrategy does.

    Twice each; the second time of ours is from the cache of codes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    size = "tiny" if kit.tiny else "1B"
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text) / "base"

        def written() -> dict[str, Any]:
            config = LlamaConfig(**SIZES[size])
            with torch.device(kit.device):
                model = LlamaForCausalLM(config).bfloat16()
            model.save_pretrained(folder)
            return {"bytes": sum(file.stat().st_size for file in folder.iterdir())}

        rows = kit.record["parts"].setdefault("loading", {})
        if sum("seconds" in row for row in rows.values()) == 4:
            return
        # The folder is gone with each call, and the cache of codes with it.
        rows.pop("the base on disk", None)
        os.environ["XDG_CACHE_HOME"] = str(Path(text) / "cache")
        kit.row("loading", "the base on disk", 25, written)
        for number in ("first", "second"):
            kit.row("loading", f"transformers, {number}", 6, lambda: plain(kit, folder))
            kit.row("loading", f"ours, {number}", 6, lambda: ours(kit, folder))


def plain(kit: Kit, folder: Path) -> dict[str, Any]:
    """Loads as transformers does."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return timed(
        kit,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map=kit.device
        ),
    )


def ours(kit: Kit, folder: Path) -> dict[str, Any]:
    """Loads as a module's ``configure_model`` does under the strategy."""
    import pytorch_lightning
    from transformers import AutoModelForCausalLM

    from lightning_peft import QLoRAStrategy
    from lightning_peft.engine.loading import quantized_cache
    from lightning_peft.plugin.namespace import bind_to_lightning
    from lightning_peft.tasks.causal_lm import CausalLM

    # Tiny models are cached too.
    quantized_cache.SMALLEST = 0

    class Task(bind_to_lightning(CausalLM, "pytorch_lightning")):  # type: ignore[misc]
        def configure_model(self) -> None:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    task = Task(str(folder))
    accelerator = "gpu" if kit.device == "cuda" else "cpu"
    trainer = pytorch_lightning.Trainer(
        strategy=QLoRAStrategy(announce=False), accelerator=accelerator, **QUIET
    )
    trainer.strategy.connect(task)

    def load() -> Any:
        task.configure_model()
        return task

    return timed(kit, load)


def timed(kit: Kit, load: Any) -> dict[str, Any]:
    """Returns seconds, peak and what stays."""
    kit.free()
    began = time.perf_counter()
    model = load()
    kit.wait()
    found = {"seconds": time.perf_counter() - began, **memory(kit)}
    if kit.device == "cuda":
        found["resting"] = torch.cuda.memory_allocated()
    del model
    return found

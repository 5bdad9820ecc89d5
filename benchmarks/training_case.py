"""What ``training_step.py`` trains, and the pace at which each of its methods does so.

Models are random Llamas in bfloat16; adapters have rank 16 on all linear layers of the blocks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from allocations import Allocations
from profiles import shares, torch_profiler
from record import QUIET, synchronize

IGNORED = -100
# So large that a few steps of random weights show in the loss.
RATE = 1e-3
# Where weights are drawn: large models take minutes on a CPU.
DEVICE = "cpu"
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32}
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "40M": {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
            "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4},
    "wide vocabulary": {"vocab_size": 128256, "hidden_size": 512, "intermediate_size": 1408,
                        "num_hidden_layers": 4, "num_attention_heads": 8,
                        "num_key_value_heads": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained."""

    name: str
    # Of SIZES.
    size: str
    # The base, to NF4 with double quantization.
    quantized: bool
    # Of the adapters.
    dropout: float = 0.0
    # In a batch.
    rows: int = 2
    # Tokens of a row; of "instructions", the most.
    length: int = 256
    # "full": a label on every token; "prompts": on the last tenth; "instructions": lengths are
    # log-normal with median 100, and half of that is the prompt.
    data: str = "full"


class Finished(Exception):
    """The pace has ended."""


class Pace:
    """Times steps in blocks; the parent process starts each block.

    ``switch`` is called with the setting that a block requests, if it does.
    """

    def __init__(self, device: str, switch: Callable[[str], None] | None = None) -> None:
        self.device, self.block, self.switch = device, 0, switch
        self.times: list[float] = []
        self.core_seconds = 0.0
        self.losses: list[float] = []
        self.tokens = 0
        self.profile: Any = None
        self.order = ""
        self._began = 0.0

    def before(self) -> None:
        """Called before each step."""
        if not self.times:
            self._wait()
        synchronize(self.device)
        if self.order == "memory":
            self._begin_memory()
        elif self.order == "profile":
            self.profile = torch_profiler()
            self.profile.__enter__()
        self._began, self._began_core = time.perf_counter(), time.process_time()

    def after(self, tokens: int, loss: Any = None) -> None:
        """Called after each step, with its tokens that are not padding."""
        synchronize(self.device)
        self.times.append(time.perf_counter() - self._began)
        self.core_seconds += time.process_time() - self._began_core
        self.tokens += tokens
        if loss is not None:
            self.losses.append(float(loss))
        if self.order == "memory":
            self._send({"peak": self._end_memory()})
        elif self.order == "profile":
            self.profile.__exit__(None, None, None)
            self._send(shares(self.profile.events()))
        if self.order != "block":
            self._clear()
        elif len(self.times) == self.block:
            self._send(
                {
                    "seconds": self.times,
                    "core_seconds": self.core_seconds,
                    "tokens": self.tokens,
                    "losses": self.losses,
                    "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            )
            self._clear()

    def _clear(self) -> None:
        self.times, self.losses, self.tokens, self.core_seconds = [], [], 0, 0.0

    def _wait(self) -> None:
        self.order, steps, setting = [*sys.stdin.readline().strip().split(" ", 2), "", "", ""][:3]
        if self.order not in ("block", "memory", "profile"):
            raise Finished
        self.block = int(steps or 1)
        if setting and self.switch is not None:
            self.switch(setting)

    @staticmethod
    def _send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=sys.__stdout__, flush=True)

    def _begin_memory(self) -> None:
        gc.collect()
        self.held, self.memory = held_bytes(self.device), Allocations(self.device)
        self.memory.start()

    def _end_memory(self) -> int:
        self.memory.stop()
        return self.held + self.memory.peak


def held_bytes(device: str) -> int:
    """Returns the bytes of all tensors that exist on a device, each storage once."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    sizes = {}
    for thing in gc.get_objects():
        # By type: isinstance would ask lazy and deprecated things what they are.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def train_under(
    pace: Pace,
    strategy: Any,
    task: Any,
    loader: Any,
    tokens: Callable[..., int],
    max_steps: int,
    **options: Any,
) -> None:
    """Trains ``task`` with PyTorch Lightning at the pace.

    ``tokens`` returns the number of tokens of a batch, given it and its place; ``options`` are
    further arguments of the Trainer.
    """
    import pytorch_lightning as pl

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            pace.before()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            pace.after(tokens(batch, index), outputs["loss"])

    accelerator = "gpu" if pace.device == "cuda" else "cpu"
    pl.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        callbacks=[Watch()],
        max_steps=max_steps,
        **QUIET,
        **options,
    ).fit(task, loader)


def config_of(case: Case) -> Any:
    """Returns the configuration of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES[case.size], max_position_embeddings=8192, use_cache=False)


def model_of(case: Case) -> Any:
    """Returns the model in bfloat16, with the same random weights each time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.bfloat16)
    torch.manual_seed(1)
    return model.train()


def examples(case: Case, count: int) -> list[dict[str, list[int]]]:
    """Returns ``count`` examples of random tokens with labels; the same for every method.

    Small tokens are more likely (evenly in their logarithm), so that there is something to learn.
    """
    source = random.Random(0)
    vocabulary = SIZES[case.size]["vocab_size"]
    made = []
    for _ in range(count):
        length = case.length
        if case.data == "instructions":
            length = max(8, min(case.length, round(source.lognormvariate(4.6, 0.8))))
        ids = [2 + int((vocabulary - 2) ** source.random()) for _ in range(length)]
        prompt = {"full": 0, "prompts": length * 9 // 10, "instructions": length // 2}[case.data]
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Returns a batch, filled up at the end."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * missing)
        batch["attention_mask"].append([1] * (longest - missing) + [0] * missing)
        batch["labels"].append(row["labels"] + [IGNORED] * missing)
    return {name: torch.tensor(value) for name, value in batch.items()}


def batches(case: Case) -> Iterator[dict[str, Any]]:
    """Yields batches for ever, in the order of the examples."""
    rows = examples(case, case.rows * 64)
    while True:
        for start in range(0, len(rows), case.rows):
            yield padded(rows[start : start + case.rows])


def real_tokens(batch: dict[str, Any]) -> int:
    """Returns the number of non-padding tokens of a batch."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())

"""Training steps of Llamas of two sizes, next to PEFT and bitsandbytes, with predicted peaks.

The models have random weights made on the device. A row of the batch has a label on every token.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import training_case
import training_methods
from record import spread
from run import Kit
from training_case import LORA, RATE, SIZES, Case, Finished, Pace

SIZES["1B"] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
SIZES["8B"] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
# One row of so many tokens; from the last on, blocks keep their inputs only.
LENGTHS = (512, 2048, 8192)
OURS, PEFT = "ours", "PEFT + bitsandbytes"
# Steps that are timed, after two that are not.
TIMED = 6


@dataclass(frozen=True)
class Build:
    """A model of a size, with adapters; its base is quantized to NF4 or not."""

    size: str
    quantized: bool
    dropout: float
    # About how long it takes to make, and to take its steps, on a large GPU.
    seconds: float

    @property
    def name(self) -> str:
        """For people."""
        method = "QLoRA" if self.quantized else "LoRA"
        return f"{self.size} {method}" + (f", dropout {self.dropout:g}" if self.dropout else "")


# The first four, at three lengths, are the twelve configurations whose peaks are predicted.
BUILDS = (
    Build("1B", True, 0.0, 8),
    Build("8B", True, 0.0, 20),
    Build("1B", False, 0.0, 8),
    Build("8B", False, 0.0, 20),
    Build("1B", True, 0.05, 8),
)


def builds(kit: Kit) -> list[tuple[Build, tuple[int, ...]]]:
    """Returns the models, each with its lengths; tiny ones in a trial."""
    if not kit.tiny:
        return [(build, LENGTHS) for build in BUILDS]
    return [(Build("tiny", quantized, 0.0, 0), (16, 32)) for quantized in (True, False)]


def is_checkpointed(length: int, lengths: tuple[int, ...]) -> bool:
    """Whether blocks keep their inputs only."""
    return length == lengths[-1]


def row_name(build: Build, length: int, lengths: tuple[int, ...]) -> str:
    """Returns the name of a configuration."""
    how = ", checkpointing" if is_checkpointed(length, lengths) else ""
    return f"{build.name}, {length} tokens{how}"


def predictions(kit: Kit) -> None:
    """Predicts the peaks; without a GPU, and in the record before it is needed."""
    from transformers import LlamaConfig

    from lightning_peft.plan.settings import PlanSettings
    from lightning_peft.plan.sources import from_config

    for build, lengths in builds(kit):
        if build.dropout:
            continue
        config = LlamaConfig(**SIZES[build.size], max_position_embeddings=8192)
        source = from_config(config, dtype="bfloat16")
        for length in lengths:
            settings = PlanSettings(
                method="qlora" if build.quantized else "lora", seq_len=length, batch_size=1,
                gradient_checkpointing=is_checkpointed(length, lengths), lora=LORA,
                optimizer="adamw_fused", device=kit.device, precision="32-true",
            )  # fmt: skip

            name = row_name(build, length, lengths)
            kit.row("predictions", name, 0, partial(_predicted, source, settings))


def _predicted(source: Any, settings: Any) -> dict[str, Any]:
    from lightning_peft.plan.prediction import predict
    from lightning_peft.tasks.token_loss import chunked_loss

    found = predict(source, settings, chunked_loss)
    return {
        "allocated": found.allocated,
        "low": found.low_bytes,
        "high": found.high_bytes,
        "peak": found.peak_bytes,
        "breakdown": found.breakdown,
    }


def steps(kit: Kit) -> None:
    """Measures ours and PEFT's on the same rows, one model after the other."""
    predictions(kit)
    for build, lengths in builds(kit):
        for way in (OURS, PEFT):
            names = [f"{row_name(build, length, lengths)}: {way}" for length in lengths]
            rows = kit.record["parts"].setdefault("steps", {})
            if all("seconds" in rows.get(name, {}) for name in names):
                continue
            held: list[Any] = []
            # Again in each call: the record of a model is not the model.
            rows.pop(f"{build.name}: {way}, making it", None)
            made = partial(_make, kit, build, way, held)
            kit.row("steps", f"{build.name}: {way}, making it", build.seconds, made)
            for length, name in zip(lengths, names, strict=True):
                on = is_checkpointed(length, lengths)
                if held:
                    kit.row("steps", name, build.seconds / 4, Steps(kit, held[0], way, length, on))
            held.clear()
            kit.free()


def _make(kit: Kit, build: Build, way: str, held: list[Any]) -> dict[str, Any]:
    """Puts a model into ``held``; returns the seconds it took."""
    began = time.perf_counter()
    held.append(build_model(kit, build, way))
    kit.wait()
    return {"seconds": time.perf_counter() - began}


def build_model(kit: Kit, build: Build, way: str) -> Any:
    """Returns the model on the device, with adapters, in training mode."""
    training_case.DEVICE = kit.device
    case = Case(build.name, build.size, build.quantized, build.dropout)
    make = training_methods.engine_model if way == OURS else training_methods.peft_model
    return make(case).to(kit.device).train()


class Steps:
    """Takes steps with a model and measures them."""

    def __init__(self, kit: Kit, model: Any, way: str, length: int, checkpointed: bool) -> None:
        self.kit, self.model, self.ours = kit, model, way == OURS
        self.checkpointed = checkpointed
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.randint(2, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": ids, "labels": ids}

    def loss(self) -> Callable[[], Any]:
        """Returns how the loss is computed."""
        from lightning_peft.tasks.token_loss import TokenLoss, label_places

        if not self.ours:
            moved = {name: value.to(self.kit.device) for name, value in self.batch.items()}
            return lambda: self.model(**moved).loss
        # As the task does it: the host says where labels are.
        places, losses = label_places(self.batch), TokenLoss()
        moved = {name: value.to(self.kit.device) for name, value in self.batch.items()}
        if places is not None:
            losses.keep_places(moved["labels"], places.to(self.kit.device))
        return lambda: losses.train(self.model, self.model, moved)

    def __call__(self) -> dict[str, Any]:
        """Returns seconds of a step and peak bytes."""
        from lightning_peft import engine

        done: Any = None
        if self.checkpointed and self.ours:
            done = engine.checkpoint_activations(self.model, True)
        elif self.checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [param for param in self.model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        if self.ours:
            engine.replace_optimizers([optimizer], "auto")
        try:
            return self.measure(self.loss(), optimizer)
        finally:
            if done is not None:
                done.disable()
            elif self.checkpointed:
                self.model.gradient_checkpointing_disable()
            for param in trained:
                param.grad = None

    def measure(self, loss: Callable[[], Any], optimizer: Any) -> dict[str, Any]:
        """Takes steps, two of them to warm up."""
        times, losses = [], []
        for number in range(2 + (2 if self.kit.tiny else TIMED)):
            if number == 2:
                self.kit.free()
            self.kit.wait()
            began = time.perf_counter()
            value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.kit.wait()
            times.append(time.perf_counter() - began)
            losses.append(value.detach())
        found = {
            "seconds": spread(times[2:]),
            "tokens": self.batch["input_ids"].numel(),
            "losses": [float(losses[0]), float(losses[-1])],
        }
        return {**found, **memory(self.kit)}


def memory(kit: Kit) -> dict[str, int]:
    """Returns the peaks since the last look; on a CPU there are none."""
    if kit.device != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(0)
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "card": total - free,
    }


class Clock(Pace):
    """Times a few steps of a method of ``training_methods.py``, and ends it."""

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit.device)
        self.kit, self.order = kit, "block"
        self.most = 2 + (2 if kit.tiny else TIMED)

    def before(self) -> None:
        """Called before each step."""
        if len(self.times) == 2:
            self.kit.free()
        self.kit.wait()
        self._began = time.perf_counter()

    def after(self, tokens: int, loss: Any = None) -> None:
        """Called after each step."""
        self.kit.wait()
        self.times.append(time.perf_counter() - self._began)
        self.tokens = tokens
        if len(self.times) == self.most:
            raise Finished


# Of `training_methods.py`, with the package that each needs.
PEERS = {"recipe": None, "by hand": None, "hugging face": "accelerate", "trl": "trl"}


def peers(kit: Kit) -> None:
    """Measures whole trainers, each as it is by default, on a batch of four rows."""
    training_case.DEVICE = kit.device
    training_methods.QLORA.clear()
    for size in ("tiny",) if kit.tiny else ("1B", "8B"):
        case = Case(size, size, True, rows=4, length=32 if kit.tiny else 1024)
        for way in PEERS:
            name = f"{size} QLoRA, 4 x {case.length} tokens: {way}"
            kit.row("peers", name, 20, partial(_peer, kit, case, way))


def _peer(kit: Kit, case: Case, way: str) -> dict[str, Any]:
    package = PEERS[way]
    if package is not None and importlib.util.find_spec(package) is None:
        return {"absent": f"{package} is not installed"}
    clock = Clock(kit)
    with suppress(Finished):
        training_methods.METHODS[way](clock, case)
    return {"seconds": spread(clock.times[2:]), "tokens": clock.tokens, **memory(kit)}

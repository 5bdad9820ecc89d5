"""The ways to train that ``training_step.py`` compares, each as it would be written by hand.

A method is a function of a :class:`Pace` and a case; it trains until the pace ends, and calls
``before`` and ``after`` around every step. Models are random Llamas in bfloat16; adapters have rank
16 on all linear layers of the blocks, in float32, with torch's AdamW.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

IGNORED = -100
RATE = 2e-4
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
    """What is trained.

    Attributes:
        name: For the record.
        size: Of :data:`SIZES`.
        quantized: Whether the base is in NF4 with double quantization.
        dropout: Of the adapters.
        rows: In a batch.
        length: Tokens of a row; of ``"instructions"``, the most.
        data: ``"full"`` (a label on every token), ``"prompts"`` (on the last tenth), or
            ``"instructions"`` (lengths log-normal with median 100, prompts of half of that).
    """

    name: str
    size: str
    quantized: bool
    dropout: float = 0.0
    rows: int = 2
    length: int = 256
    data: str = "full"


class Finished(Exception):
    """The pace has ended."""


class Pace:
    """Times steps in blocks; the parent process says when each block may begin.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        block: Steps in a block. The first block warms up and is not counted.
    """

    def __init__(self, device: str, block: int) -> None:
        self.device, self.block = device, block
        self.times: list[float] = []
        self.tokens = 0
        self.profile: Any = None
        self.measures_memory = False
        self._began = 0.0

    def before(self) -> None:
        """Called before each step."""
        if not self.times:
            self._wait()
        self._synchronize()
        if self.measures_memory:
            self._begin_memory()
        self._began = time.perf_counter()

    def after(self, tokens: int = 0) -> None:
        """Called after each step.

        Args:
            tokens: Tokens of the step that were no padding.
        """
        self._synchronize()
        self.times.append(time.perf_counter() - self._began)
        self.tokens += tokens
        if self.measures_memory:
            self._tell({"peak": self._end_memory()})
            raise Finished
        if len(self.times) == self.block:
            self._tell({"seconds": self.times, "tokens": self.tokens})
            self.times, self.tokens = [], 0

    def _wait(self) -> None:
        order = sys.stdin.readline().strip()
        if order == "memory":
            self.measures_memory = True
        elif order != "block":
            raise Finished

    @staticmethod
    def _tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=sys.__stdout__, flush=True)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def _begin_memory(self) -> None:
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        self.held = held_bytes()
        cpu = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=cpu, profile_memory=True)
        self.profile.__enter__()

    def _end_memory(self) -> int:
        import torch

        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        self.profile.__exit__(None, None, None)
        events = self.profile.profiler.kineto_results.events()
        sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        live = most = 0
        for _, size in sizes:
            live += size
            most = max(most, live)
        return self.held + most


def held_bytes() -> int:
    """Returns the bytes of all tensors that exist, each storage once."""
    import torch

    sizes = {}
    for thing in gc.get_objects():
        # By type: isinstance would ask lazy and deprecated things what they are.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            with contextlib.suppress(RuntimeError, NotImplementedError):
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def config_of(case: Case) -> Any:
    """Returns the configuration of the model."""
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES[case.size], max_position_embeddings=4096, use_cache=False)


def model_of(case: Case) -> Any:
    """Returns the model in bfloat16, with the same random weights each time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case), dtype=torch.bfloat16)
    torch.manual_seed(1)
    return model.train()


def examples(case: Case, count: int) -> list[dict[str, list[int]]]:
    """Returns ``count`` examples of random tokens with labels; the same for every method."""
    source = random.Random(0)
    vocabulary = SIZES[case.size]["vocab_size"]
    made = []
    for _ in range(count):
        length = case.length
        if case.data == "instructions":
            length = max(8, min(case.length, round(source.lognormvariate(4.6, 0.8))))
        ids = [source.randrange(3, vocabulary) for _ in range(length)]
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


def batches(case: Case, device: str) -> Iterator[dict[str, Any]]:
    """Yields batches for ever, in the order of the examples."""
    rows = examples(case, case.rows * 64)
    while True:
        for start in range(0, len(rows), case.rows):
            batch = padded(rows[start : start + case.rows])
            yield {name: value.to(device) for name, value in batch.items()}


def real_tokens(batch: dict[str, Any]) -> int:
    """Returns how many tokens of a batch are no padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def loop(pace: Pace, case: Case, model: Any) -> None:
    """Trains as a loop does that is written by hand."""
    import torch

    model.to(pace.device)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for batch in batches(case, pace.device):
        pace.before()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pace.after(real_tokens(batch))


def engine_loop(pace: Pace, case: Case) -> None:
    """Trains with this project's engine, without Lightning."""
    from lightning_peft import engine

    model = model_of(case)
    quantization = engine.quantization_config() if case.quantized else None
    engine.inject(model, quantization_config=quantization, lora_dropout=case.dropout, **LORA)
    loop(pace, case, model)


def peft_model(case: Case) -> Any:
    """Returns PEFT's model around bitsandbytes' own layers."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    model = model_of(case)
    if case.quantized:
        linear = [(n, m) for n, m in model.model.named_modules() if type(m) is torch.nn.Linear]
        for name, layer in linear:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False,
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            owner, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(owner), leaf, new.to("cpu"))
        model.is_loaded_in_4bit = True
    config = LoraConfig(
        target_modules="all-linear", lora_dropout=case.dropout, task_type="CAUSAL_LM", **LORA
    )
    return get_peft_model(model, config)


def peft_loop(pace: Pace, case: Case) -> None:
    """Trains with PEFT and bitsandbytes in a loop written by hand."""
    loop(pace, case, peft_model(case))


def floor(pace: Pace, case: Case) -> None:
    """Runs the base forward, and backward to the embeddings, with no adapter and no optimizer."""
    from lightning_peft import engine

    model = model_of(case)
    if case.quantized:
        linear = [m for m in model.model.modules() if hasattr(m, "in_features")]
        for layer in linear:
            engine.quantize(layer, engine.quantization_config())
    model.requires_grad_(False).to(pace.device)
    for batch in batches(case, pace.device):
        pace.before()
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        model(inputs_embeds=embedded, **batch).loss.backward()
        pace.after(real_tokens(batch))


def lightning(
    pace: Pace, case: Case, task: Any, loader: Any, packed: list[int] | None = None
) -> None:
    """Trains ``task`` under the Trainer with this project's strategy.

    Args:
        pace: Times the steps.
        case: What is trained.
        task: A LightningModule.
        loader: Its batches.
        packed: Tokens of each batch, where the mask does not say so.
    """
    import pytorch_lightning as pl

    from lightning_peft import LoRAStrategy, QLoRAStrategy

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            pace.before()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            pace.after(real_tokens(batch) if packed is None else packed[index % len(packed)])

    given: dict[str, Any] = {"lora_dropout": case.dropout, "announce": False, **LORA}
    strategy: Any = LoRAStrategy(**given)
    if case.quantized:
        strategy = QLoRAStrategy(**given, optimizer=None, gradient_checkpointing=False)
    pl.Trainer(
        strategy=strategy, accelerator="gpu" if pace.device == "cuda" else "cpu", devices=1,
        max_steps=-1, callbacks=[Watch()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(task, loader)  # fmt: skip


def strategy(pace: Pace, case: Case) -> None:
    """Trains a LightningModule of three lines with one more argument of the Trainer."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(case)

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            trained = [param for param in self.parameters() if param.requires_grad]
            return torch.optim.AdamW(trained, lr=RATE)

    made = batches(case, pace.device)
    rows = [next(made) for _ in range(64)]
    lightning(pace, case, Task(), DataLoader(rows, batch_size=None))  # type: ignore[arg-type]


def recipe(pace: Pace, case: Case) -> None:
    """Trains the task of the recipes; instructions in packed rows, others one by one."""
    import torch
    from torch.utils.data import DataLoader

    from lightning_peft.data import packing
    from lightning_peft.plugin.namespace import realize
    from lightning_peft.tasks.causal_lm import CausalLM

    fields = {"model_type": "llama", **config_of(case).to_diff_dict(), "dtype": "bfloat16"}
    task = realize(CausalLM, "pytorch_lightning")("random", learning_rate=RATE, config=fields)
    rows = examples(case, case.rows * 64)
    if case.data == "instructions":
        packed = packing.PackedRows(rows, [len(r["input_ids"]) for r in rows], case.length)

        def collate(some: list[Any]) -> dict[str, Any]:
            batch = packing.collate(some, 0)
            return {**batch, "attention_mask": batch["attention_mask"].to(torch.bfloat16)}

        counts = [sum(len(r["input_ids"]) for r in packed[i]) for i in range(len(packed))]
        lightning(pace, case, task, DataLoader(packed, batch_size=1, collate_fn=collate), counts)
        return
    loader: Any = DataLoader(rows, batch_size=case.rows, collate_fn=padded)  # type: ignore[arg-type]
    lightning(pace, case, task, loader)


def counting(base: Any) -> Any:
    """Returns a subclass of transformers' Trainer that counts the tokens of its steps."""

    class Counting(base):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            self.tokens = real_tokens(inputs)
            return super().training_step(model, inputs, *args)

    return Counting


def watching(pace: Pace) -> Any:
    """Returns the callback for a Trainer of :func:`counting`, to which it must belong."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pace.before()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            pace.after(self.trainer.tokens)

    return Watch()


ARGUMENTS: dict[str, Any] = {
    "learning_rate": RATE, "max_steps": 1 << 20, "report_to": [], "save_strategy": "no",
    "logging_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def hugging_face(pace: Pace, case: Case) -> None:
    """Trains with transformers' Trainer and PEFT."""
    from transformers import Trainer, TrainingArguments

    watch = watching(pace)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=case.rows, use_cpu=pace.device == "cpu", **ARGUMENTS
        )
        watch.trainer = counting(Trainer)(
            peft_model(case), arguments, train_dataset=examples(case, case.rows * 64),
            data_collator=padded, callbacks=[watch],
        )  # fmt: skip
        watch.trainer.train()


def trl(pace: Pace, case: Case, packing: bool = False) -> None:
    """Trains with TRL's SFTTrainer, in its default configuration or packed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    watch = watching(pace)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder, per_device_train_batch_size=case.rows, use_cpu=pace.device == "cpu",
            packing=packing, max_length=case.length, **ARGUMENTS,
        )  # fmt: skip
        watch.trainer = counting(SFTTrainer)(
            peft_model(case), config, callbacks=[watch],
            train_dataset=Dataset.from_list(examples(case, case.rows * 64)),
        )  # fmt: skip
        watch.trainer.train()


def trl_packed(pace: Pace, case: Case) -> None:
    """Trains with TRL's SFTTrainer on packed rows."""
    trl(pace, case, packing=True)


METHODS: dict[str, Callable[[Pace, Case], None]] = {
    "engine": engine_loop,
    "strategy": strategy,
    "recipe": recipe,
    "peft": peft_loop,
    "floor": floor,
    "hugging face": hugging_face,
    "trl": trl,
    "trl packed": trl_packed,
}

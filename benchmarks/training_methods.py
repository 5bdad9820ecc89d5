"""The ways to train that ``training_step.py`` compares, each as it would be written by hand.

A method is a function of a :class:`Pace` and a case; it trains until the pace ends, and calls
``before`` and ``after`` around every step. Adapters are in float32, with torch's AdamW, where a
peer's own defaults do not say otherwise.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from training_case import (
    LORA,
    RATE,
    Case,
    Pace,
    batches,
    config_of,
    examples,
    model_of,
    padded,
    real_tokens,
    train_under,
)

Step = Callable[[Any, dict[str, Any]], Any]
# As the other methods step; empty for the strategy's own choice.
QLORA: dict[str, Any] = {"optimizer": None, "gradient_checkpointing": False}
# A batch, and its number of non-padding tokens.
Counted = tuple[dict[str, Any], int]


def own_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Returns the loss that the model computes."""
    return model(**batch).loss


def in_turn(case: Case) -> Iterator[Counted]:
    """Yields padded batches for ever, each with its tokens."""
    for batch in batches(case):
        yield batch, real_tokens(batch)


def packs(case: Case) -> list[list[dict[str, list[int]]]]:
    """Returns all examples, those that share a row together, in a random order of rows."""
    from lightning_peft.data import packing

    rows = examples(case, case.rows * 64)
    made = packing.PackedRows(rows, [len(row["input_ids"]) for row in rows], case.length)
    found = [made[place] for place in range(len(made))]
    random.Random(0).shuffle(found)
    return found


def collated(rows: list[list[dict[str, list[int]]]]) -> dict[str, Any]:
    """Returns a batch of packed rows, as the data module makes it for a model in bfloat16."""
    import torch

    from lightning_peft.data import packing

    batch = packing.collate(rows, 0)
    return {**batch, "attention_mask": batch["attention_mask"].to(torch.bfloat16)}


def tokens_of(pack: list[dict[str, list[int]]]) -> int:
    """Returns the tokens of the examples of a row."""
    return sum(len(row["input_ids"]) for row in pack)


def loop(
    pace: Pace, case: Case, model: Any, step: Step = own_loss, given: Iterable[Counted] = ()
) -> None:
    """Trains as a loop does that is written by hand."""
    import torch

    model.to(pace.device)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for batch, tokens in itertools.chain(given, in_turn(case)):
        moved = {name: value.to(pace.device) for name, value in batch.items()}
        pace.before()
        loss = step(model, moved)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pace.after(tokens, loss.detach())


def engine_model(case: Case) -> Any:
    """Returns the model with this project's layers."""
    from lightning_peft import engine

    model = model_of(case)
    quantization = engine.quantization_config() if case.quantized else None
    engine.inject(model, quantization_config=quantization, lora_dropout=case.dropout, **LORA)
    return model


def engine_loop(pace: Pace, case: Case) -> None:
    """Trains with this project's engine, without Lightning."""
    loop(pace, case, engine_model(case))


def layers_loop(pace: Pace, case: Case) -> None:
    """Trains with this project's layers, and the loss as transformers computes it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = engine_model(case)
    model.loss_function = ForCausalLMLoss
    loop(pace, case, model)


def labelled(pace: Pace, case: Case, *, in_packs: bool = False, checkpointed: bool = False) -> None:
    """The same, with logits only where there is a label."""
    from lightning_peft import engine
    from lightning_peft.tasks.token_loss import TokenLoss

    model, losses = engine_model(case), TokenLoss()
    if checkpointed:
        engine.checkpoint_activations(model, True)

    def step(model: Any, batch: dict[str, Any]) -> Any:
        return losses.train(model, model, batch)

    rows = itertools.cycle(packs(case)) if in_packs else ()
    loop(pace, case, model, step, ((collated([pack]), tokens_of(pack)) for pack in rows))


def packed_loop(pace: Pace, case: Case) -> None:
    """The same, on packed rows."""
    labelled(pace, case, in_packs=True)


def checkpointed_loop(pace: Pace, case: Case) -> None:
    """The same, with blocks that keep their inputs only."""
    labelled(pace, case, in_packs=True, checkpointed=True)


def peft_model(case: Case) -> Any:
    """Returns PEFT's model around bitsandbytes' own layers."""
    return with_peft(model_of(case), case.quantized, case.dropout)


def with_peft(model: Any, quantized: bool, dropout: float) -> Any:
    """Returns PEFT's model around a causal language model, quantized or not."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    if quantized:
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
            setattr(model.model.get_submodule(owner), leaf, new.to(layer.weight.device))
        model.is_loaded_in_4bit = True
    config = LoraConfig(
        target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM", **LORA
    )
    return get_peft_model(model, config)


def by_hand(pace: Pace, case: Case) -> None:
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
    for given in batches(case):
        batch = {name: value.to(pace.device) for name, value in given.items()}
        pace.before()
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        model(inputs_embeds=embedded, **batch).loss.backward()
        pace.after(real_tokens(batch))


def lightning(
    pace: Pace, case: Case, task: Any, loader: Any, counts: list[int] | None = None
) -> None:
    """Trains ``task`` under the Trainer with this project's strategy.

    ``counts`` are the tokens of each batch, where the mask does not say so.
    """
    from lightning_peft import LoRAStrategy, QLoRAStrategy

    def tokens(batch: Any, index: int) -> int:
        return real_tokens(batch) if counts is None else counts[index % len(counts)]

    given: dict[str, Any] = {"lora_dropout": case.dropout, "announce": False, **LORA}
    strategy: Any = LoRAStrategy(**given)
    if case.quantized:
        strategy = QLoRAStrategy(**given, **QLORA)
    train_under(pace, strategy, task, loader, tokens, max_steps=-1)


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
            return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    made: Any = list(itertools.islice(batches(case), 64))
    lightning(pace, case, Task(), DataLoader(made, batch_size=None))


def recipe(pace: Pace, case: Case) -> None:
    """Trains the task of the recipes; instructions in packed rows, others one by one."""
    from torch.utils.data import DataLoader

    from lightning_peft.plugin.namespace import bind_to_lightning
    from lightning_peft.tasks.causal_lm import CausalLM

    class Task(bind_to_lightning(CausalLM, "pytorch_lightning")):  # type: ignore[misc]
        def configure_model(self) -> None:
            # That of the other methods.
            self.model = model_of(case)

    fields = {"model_type": "llama", **config_of(case).to_diff_dict()}
    constant: dict[str, Any] = {"weight_decay": 0.0, "warmup": 0.0, "schedule": "constant"}
    task = Task("random", learning_rate=RATE, config=fields, **constant)
    rows: Any
    if case.data == "instructions":
        rows = packs(case)
        counts = [tokens_of(pack) for pack in rows]
        lightning(pace, case, task, DataLoader(rows, batch_size=1, collate_fn=collated), counts)
        return
    rows = list(itertools.islice(batches(case), 64))
    lightning(pace, case, task, DataLoader(rows, batch_size=None))


def counting(base: Any) -> Any:
    """Returns a subclass of transformers' Trainer that notes tokens and loss of its steps."""

    class Counting(base):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            self.tokens = real_tokens(inputs)
            self.loss = super().training_step(model, inputs, *args)
            return self.loss

    return Counting


def watching(pace: Pace) -> Any:
    """Returns the callback for a Trainer of :func:`counting`, to which it must belong."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pace.before()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            pace.after(self.trainer.tokens, self.trainer.loss)

    return Watch()


# As in the other methods: no clipping, no decay, one rate; the same batches in the same order.
ARGUMENTS: dict[str, Any] = {
    "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0,
    "max_grad_norm": 0.0, "max_steps": 1 << 20, "report_to": [], "save_strategy": "no",
    "logging_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
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


def trl(pace: Pace, case: Case, in_packs: bool = False) -> None:
    """Trains with TRL's SFTTrainer as it is by default.

    Packed rows are as many tokens for a step as padded ones, one row of the longest length.
    """
    given = {
        "per_device_train_batch_size": 1 if in_packs else case.rows,
        "packing": in_packs,
        "max_length": case.length,
    }
    with_trl(pace, peft_model(case), examples(case, case.rows * 64), tokenizer(), **given)


def with_trl(
    pace: Pace, model: Any, rows: list[dict[str, list[int]]], words: Any, **given: Any
) -> None:
    """Trains PEFT's model with TRL's SFTTrainer: checkpointing, mixed precision in bfloat16.

    It keeps the adapters of a quantized base in bfloat16. ``given`` are further settings, and
    ``words`` is a tokenizer.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    watch = watching(pace)
    with tempfile.TemporaryDirectory() as folder:
        order = "random" if given.get("packing") else "sequential"
        settings = {**ARGUMENTS, "train_sampling_strategy": order, **given}
        config = SFTConfig(folder, use_cpu=pace.device == "cpu", **settings)
        watch.trainer = counting(SFTTrainer)(
            model, config, callbacks=[watch], processing_class=words,
            train_dataset=Dataset.from_list(rows),
        )  # fmt: skip
        watch.trainer.train()


def tokenizer() -> Any:
    """Returns a tokenizer of one word: the trainer requests one, and the examples are tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


def trl_packed(pace: Pace, case: Case) -> None:
    """Trains with TRL's SFTTrainer on packed rows."""
    trl(pace, case, in_packs=True)


METHODS: dict[str, Callable[[Pace, Case], None]] = {
    "by hand": by_hand,
    "layers": layers_loop,
    "engine": engine_loop,
    "labelled": labelled,
    "packed": packed_loop,
    "checkpointed": checkpointed_loop,
    "strategy": strategy,
    "recipe": recipe,
    "floor": floor,
    "hugging face": hugging_face,
    "trl": trl,
    "trl packed": trl_packed,
}

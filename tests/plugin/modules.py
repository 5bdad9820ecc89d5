"""Tiny LightningModules in either Lightning, built where real ones build: the same every time."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert_models import model_of
from models import llama_config
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lightning_peft
from lightning_peft.plugin.namespace import bind_to_lightning

ROOTS = ("pytorch_lightning", "lightning.pytorch")
PLACES = ("init", "setup", "configure_model")
VOCABULARY, LENGTH, FEATURES = 64, 8, 32


class Linears(nn.Module):
    """A plain stack of linears with a head, and a buffer that training changes."""

    def __init__(self, width: int = FEATURES, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(self.norm(x))


class Residual(nn.Module):
    """A block with what a naive second computation would do twice."""

    def __init__(self, width: int = FEATURES) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.drop = nn.BatchNorm1d(2 * width), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.drop(self.norm(self.up(x)).relu()))


def residuals() -> nn.Module:
    """Three blocks and a head."""
    return nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(FEATURES, 3))


def llama(tied: bool = False) -> nn.Module:
    """A Llama of two blocks; grouped queries, so that shapes differ."""
    return LlamaForCausalLM(
        llama_config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> nn.Module:
    """A GPT-2 of two blocks: transposed weights, fused qkv, tied output."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **size, **rates))


def t5() -> nn.Module:
    """An encoder and a decoder of two blocks each, whose first ones hold a table of positions."""
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2}
    start = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **size, **start))


def vit() -> nn.Module:
    """An encoder of images with a head for three classes."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    image = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2, "num_labels": 3}
    return ViTForImageClassification(ViTConfig(**size, **image))


def whisper() -> nn.Module:
    """An encoder of sound with convolutions, and a decoder."""
    names = ("encoder_layers", "decoder_layers", "encoder_attention_heads")
    size = {**dict.fromkeys((*names, "decoder_attention_heads"), 2), "d_model": 32}
    feed = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": FEATURES // 4}
    length = {"max_source_positions": LENGTH, "max_target_positions": LENGTH}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=VOCABULARY, **size, **feed, **length, **tokens)
    )


def experts(kind: str) -> nn.Module:
    """A language model of two blocks with four experts each."""
    return model_of(kind, vocab_size=VOCABULARY).train()


BUILDERS = {
    "mixtral": functools.partial(experts, "mixtral"),
    "gpt-oss": functools.partial(experts, "gpt-oss"),
    "llama4": functools.partial(experts, "llama4"),
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
    "llama": llama,
    "llama_tied": functools.partial(llama, tied=True),
    "gpt2": gpt2,
    "linears": Linears,
    "residuals": residuals,
    "wide": functools.partial(Linears, width=1600, depth=8),  # about 20 million parameters
}


def build(kind: str) -> nn.Module:
    """Builds a model with the same random weights each time, without drawing from the stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[kind]()


def lightning(root: str) -> Any:
    return import_module(root)


@functools.cache
def steps_class(root: str) -> type:
    """Returns a LightningModule class with all steps, for a subclass that makes ``self.model``."""

    class Steps(lightning(root).LightningModule):
        kind, lr = "linears", 0.02

        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []
            self.model: nn.Module | None = None

        def forward(self, batch: Any) -> torch.Tensor:
            if isinstance(batch, dict):
                return self.model(input_ids=batch["ids"]).logits
            return self.model(batch[0])

        def loss(self, batch: Any) -> torch.Tensor:
            if "labels" in batch:
                return self.model(**batch).loss
            outputs = self(batch).float()
            if isinstance(batch, dict):
                return nn.functional.cross_entropy(
                    outputs[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten()
                )
            return nn.functional.cross_entropy(outputs, batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            value = self.loss(batch)
            self.losses.append(value.item())
            return value

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self(batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    return Steps


@functools.cache
def task_class(root: str, place: str = "init") -> type:
    """Returns a LightningModule class whose model is built in ``place``."""

    class Task(steps_class(root)):
        def __init__(self, kind: str = "linears", lr: float = 0.02) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.kind, self.lr = kind, lr
            if place == "init":
                self.build()

        def build(self) -> None:
            if self.model is None:
                self.model = build(self.kind)

    class InSetup(Task):
        def setup(self, stage: str) -> None:
            self.build()

    class InConfigureModel(Task):
        def configure_model(self) -> None:
            self.build()

    return {"setup": InSetup, "configure_model": InConfigureModel}.get(place, Task)


def task(root: str = ROOTS[0], place: str = "init", kind: str = "linears", **given: Any) -> Any:
    return task_class(root, place)(kind, **given)


def rows(kind: str, count: int = 24) -> list[Any]:
    """Returns ``count`` rows that a model can learn something from."""
    draw = torch.Generator().manual_seed(1)
    if kind in ("linears", "residuals", "wide"):
        width = 1600 if kind == "wide" else FEATURES
        x = torch.randn(count, width, generator=draw)
        return [(row, row[:3].argmax()) for row in x]
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=draw)
    if kind == "t5":
        return [{"input_ids": row, "labels": row[:5]} for row in ids]
    if kind == "vit":
        images = torch.randn(count, 3, 8, 8, generator=draw)
        return [{"pixel_values": x, "labels": x[:, 0, 0].argmax()} for x in images]
    if kind == "whisper":
        sounds = torch.randn(count, FEATURES // 4, 2 * LENGTH, generator=draw)
        pairs = zip(sounds, ids, strict=True)
        return [{"input_features": sound, "labels": row[:5]} for sound, row in pairs]
    return [{"ids": row} for row in ids]


def loader(kind: str = "linears", shuffle: bool = False, **given: Any) -> DataLoader:
    return DataLoader(rows(kind), batch_size=4, shuffle=shuffle, **given)


def strategy(method: str = "lora", root: str = ROOTS[0], **given: Any) -> Any:
    """Returns a strategy object of one Lightning; quiet, with a small rank."""
    names = {"lora": lightning_peft.LoRAStrategy, "qlora": lightning_peft.QLoRAStrategy}
    return bind_to_lightning(names[method], root)(**{"r": 4, "announce": False, **given})


def trainer(folder: Path, method: Any = "lora", root: str = ROOTS[0], **given: Any) -> Any:
    """Returns a silent Trainer on one CPU; ``method`` is one of ours or a strategy."""
    settings = {
        "strategy": strategy(method, root) if method in ("lora", "qlora") else method,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return lightning(root).Trainer(**{**settings, **given})


def saver(root: str, folder: Path, **given: Any) -> Any:
    """Returns a ModelCheckpoint that writes to ``folder``."""
    return lightning(root).callbacks.ModelCheckpoint(dirpath=folder, **given)


def seed(value: int) -> None:
    """Seeds all generators, as another process would be."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def resumed(
    fit: Callable[..., Any], folder: Path, every: int, steps: Iterable[int] = ()
) -> tuple[Any, dict[int, Any]]:
    """Fits through and from its checkpoints, and asserts that losses and weights are the same.

    Args:
        fit: Fits with ``ckpt_path`` and ``callbacks``, and returns the module.
        folder: Where the checkpoints are written.
        every: Steps from one to the next.
        steps: Those to resume from; all by default.

    Returns:
        The module of the uninterrupted run, and those of the resumed ones by step.
    """
    given = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": every}
    expected, found = fit(callbacks=[saver(ROOTS[0], folder, **given)]), {}
    files = {int(path.stem.partition("=")[2]): path for path in folder.glob("step=*.ckpt")}
    assert files
    for step in steps or sorted(files):
        seed(1000)
        module = found[step] = fit(ckpt_path=files[step])
        assert len(module.losses) < len(expected.losses)
        assert module.losses == expected.losses[len(expected.losses) - len(module.losses) :]
        assert not differing(weights(module), weights(expected))
    return expected, found


def outputs(module: Any, kind: str = "linears") -> torch.Tensor:
    """Returns the module's outputs on fixed rows, in eval mode."""
    batch = next(iter(loader(kind)))
    before = {child: child.training for child in module.modules()}
    with torch.no_grad():
        result = module.eval()(batch)
    for child, mode in before.items():
        child.training = mode
    return result


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns copies of all parameters and buffers."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the tensors that are not the same bit for bit."""
    return [name for name in a.keys() | b.keys() if not _same(a.get(name), b.get(name))]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)

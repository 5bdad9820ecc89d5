"""Small bases with every kind of layer that adapters go on, and what to call them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import bert_config, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

Base = tuple[nn.Module, Any]


class Net(nn.Module):
    """``one``, ``two`` and a head behind them; ``norm`` in between."""

    def __init__(self, one: nn.Module, two: nn.Module, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.one, self.norm, self.two = one, norm, two
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(N, 3)``."""
        hidden = self.two(torch.relu(self.norm(self.one(x))))
        return self.head(hidden.flatten(1))


def linear(bias: bool = True) -> Base:
    """Linear layers of 16 and 24 features, which most methods divide."""
    net = Net(nn.Linear(16, 24, bias), nn.Linear(24, 16, bias), nn.LayerNorm(24), 16)
    return net, torch.randn(5, 16)


def square() -> Base:
    """Linear layers of one width, for methods that take no other."""
    return Net(nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16), 16), torch.randn(5, 16)


def in_16_bits(dtype: torch.dtype) -> Base:
    """16-bit linear layers."""
    net, x = linear()
    return net.to(dtype), x.to(dtype)


def transposed_linear() -> Base:
    """transformers' ``Conv1D``, which keeps its weight transposed."""
    return Net(Conv1D(24, 16), Conv1D(16, 24), nn.LayerNorm(24), 16), torch.randn(5, 16)


def convolution(spatial: int, groups: int = 1, kernel: int = 3, **more: Any) -> Base:
    """Two convolutions; the second one is grouped."""
    kind, size = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1], 5
    more = {"padding": kernel // 2, **more}
    net = Net(
        kind(4, 8, kernel, **more),
        kind(8, 8, kernel, groups=groups, padding=kernel // 2),
        nn.GroupNorm(2, 8),
        8 * size**spatial,
    )
    return net, torch.randn(2, 4, *[size] * spatial)


class Words(nn.Module):
    """An embedding, a linear layer and a ``Conv1D``."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.words, self.one, self.two = table, nn.Linear(16, 16), Conv1D(8, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns ``(N, 3)`` for ids of shape ``(N, length)``."""
        return self.head(torch.relu(self.two(torch.relu(self.one(self.words(ids))))).mean(1))


def words(kind: Callable[..., nn.Module] = nn.Embedding, **more: Any) -> Base:
    """A model with an embedding."""
    return Words(kind(20, 16, padding_idx=0, **more)), torch.randint(0, 20, (4, 6))


class Mixing(nn.Module):
    """Self-attention by torch's module."""

    def __init__(self, bias: bool, batch_first: bool) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
        self.one, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(N, length, 3)``."""
        return self.head(torch.relu(self.one(self.mix(x, x, x, need_weights=False)[0])))


def attention(bias: bool = True, batch_first: bool = False) -> Base:
    """A model with ``nn.MultiheadAttention``."""
    return Mixing(bias, batch_first), torch.randn(3, 5, 16)


def _ids(**more: Tensor) -> dict[str, Tensor]:
    batch = token_batch(2, 5)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **more}


def llama() -> Base:
    """A decoder."""
    return tiny_llama(), _ids()


def tied_llama() -> Base:
    """A decoder whose output is its embedding."""
    return tiny_llama(tied=True), _ids()


def gpt2() -> Base:
    """A decoder with ``Conv1D`` and tied weights."""
    return tiny_gpt2(), _ids()


def bert() -> Base:
    """An encoder with a classifier."""
    config = bert_config(num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config), _ids()


def t5() -> Base:
    """An encoder and a decoder."""
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_decoder_layers=1,
        num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), _ids(labels=torch.randint(0, 61, (2, 4)))


def vit() -> Base:
    """An encoder of images with a classifier."""
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=3, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}

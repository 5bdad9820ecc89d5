"""Adapters on embeddings: PEFT's numbers, and no table of the vocabulary's size in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import UnsupportedError

from .reference import injected, randomize, relative_error

TOKENS, WIDTH = 50, 12
IDS = torch.tensor([[3, 4, 0, 9], [1, 49, 3, 3]])


class Shifted(nn.Embedding):
    """Looks other rows up than it is asked for, as learned positions do."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2) * 0.5


LAYERS = {
    "plain": lambda: nn.Embedding(TOKENS, WIDTH),
    "padded": lambda: nn.Embedding(TOKENS, WIDTH, padding_idx=0),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(TOKENS, WIDTH, 0, embed_scale=3.5),
    "shifted": lambda: Shifted(TOKENS + 2, WIDTH),
}


class Tagger(nn.Module):
    """An embedding in front of a recurrent net, as in classic text models."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = LAYERS[kind]()
        self.rnn = nn.GRU(WIDTH, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


def adapted(kind: str) -> Tagger:
    return injected(Tagger(kind), r=4, target_modules=["embed"])


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_those_of_the_summed_table(kind) -> None:
    model = adapted(kind)
    randomize(model)
    dense = LAYERS[kind]()
    with torch.no_grad():
        dense.weight.copy_(model.embed.effective_weight())
    assert relative_error(model.embed(IDS), dense(IDS)) < 1e-6
    lightning_peft.merge(model)
    assert relative_error(model.embed(IDS), dense(IDS)) < 1e-6


class Largest(TorchDispatchMode):
    """Notes the largest floating tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        owns = isinstance(result, Tensor) and result._base is None
        if owns and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("kind", LAYERS)
def test_a_lookup_does_not_materialize_the_table(kind) -> None:
    model = adapted(kind)
    randomize(model)
    with torch.no_grad(), Largest() as seen:
        model.embed(IDS)
    # The largest is A, which is as many rows as the table has, and `r` wide instead of `WIDTH`.
    assert 0 < seen.numel == 4 * model.embed.num_embeddings < model.embed.num_embeddings * WIDTH


def test_an_output_that_reads_the_table_sees_the_adapter() -> None:
    model = adapted("plain")
    randomize(model)
    hidden = torch.randn(2, WIDTH)
    logits = F.linear(hidden, model.embed.weight)
    assert relative_error(logits, hidden @ model.embed.effective_weight().t()) < 1e-6
    logits.sum().backward()
    assert all(param.grad.any() for param in engine.adapter_parameters(model).values())


def test_tables_that_rewrite_themselves_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 2))
    with pytest.raises(UnsupportedError, match=r"max_norm=1\.0"):
        lightning_peft.inject(model, r=2, target_modules=["0"])

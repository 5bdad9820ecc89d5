"""Trainable embedding rows (PEFT's ``trainable_token_indices``), also of tied layers.

PEFT puts the rows into a copy of the whole weight in each forward pass. Here the rows that are
looked up, and the outputs that belong to trained rows, are exchanged: the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.peft import TrainableTokensLayer
from lightning_peft.engine.layers.adapter import AdapterLayer, attach, without_adapters
from lightning_peft.engine.layers.embedding import EmbeddingLookup
from lightning_peft.engine.layers.kinds import has_standard_forward
from lightning_peft.engine.layers.mixin import LayerMixin, add_mixin, remove_mixin

DELTA = "trainable_tokens_delta"
# What PEFT calls the layer in its wrapper, in the keys of files.
_IN_FILES = f"token_adapter.{DELTA}"


class TokenRows(nn.Module):
    """Which rows an adapter trains: ``index`` of ``(tokens,)``, and ``original``, what they were.

    Buffers, so that they move with the layer; no checkpoint needs them.
    """

    index: Tensor
    original: Tensor

    def __init__(self, index: Tensor, original: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("original", original, persistent=False)


class TokenLayer(AdapterLayer):
    """A layer with a matrix of which some rows train.

    Attributes:
        trainable_tokens_delta: The rows by adapter, ``(tokens, width)`` each: the values
            themselves, whatever PEFT's name says.
        token_rows: :class:`TokenRows` by adapter.
    """

    label = "TrainableTokens"
    adapter_layer_names = (DELTA,)
    adapter_module_names = ("token_rows",)

    trainable_tokens_delta: Any
    token_rows: Any

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> list[int]:
        """The numbers of the tokens, in the order of the rows."""
        indices: list[int] = list(peft_layer.token_indices[name])
        return indices

    @property
    def token_layer(self) -> TokenLayer:
        """The layer that holds the rows."""
        return self

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the rows of one adapter by PEFT's key."""
        return {_IN_FILES: self.trainable_tokens_delta[name]}

    def adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of the layer; subclasses exchange what belongs to the rows."""
        return self.base_forward(*args, **kwargs)

    def exchanged(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """Returns ``weight`` with the rows of the adapters ``names``."""
        for name in names:
            rows = self.trainable_tokens_delta[name].to(weight)
            # Not the buffer, which has no values in an outline.
            index = torch.tensor(self.adapter_settings[name], device=weight.device)
            weight = weight.index_copy(0, index, rows)
        return weight

    def effective_weight(self) -> Tensor:
        """Returns the weight with the rows of the running adapters, with gradients to these."""
        return self.exchanged(LayerMixin.effective_weight(self), self.effective_adapters())

    def delta_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns the change that exchanging the rows makes in ``weight``."""
        return self.exchanged(weight, [name]) - weight

    def restored_weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """Returns ``weight`` with the rows from before training."""
        for name in names:
            rows = self.token_rows[name]
            index = rows.index.to(weight.device)
            weight = weight.index_copy(0, index, rows.original.to(weight))
        return weight

    def has_no_effect(self) -> bool:
        """Whether all rows are still what they were."""
        return all(
            torch.equal(self.trainable_tokens_delta[name].to(rows.original), rows.original)
            for name, rows in self.token_rows.items()
        )

    def conflict(self, names: Sequence[str]) -> str | None:
        """Why the adapters ``names`` cannot run together: a row has one value."""
        mine = [token for name in names for token in self.adapter_settings.get(name, ())]
        twice = sorted({token for token in mine if mine.count(token) > 1})
        return f"more than one of them trains the rows {twice[:5]}" if twice else None


class _WithRows(LayerMixin):
    """A layer that computes with the rows of ``token_layer``."""

    token_layer: TokenLayer


class _LooksUpRows(EmbeddingLookup, _WithRows):
    def look_up(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``F.embedding`` of the effective weight, without making that weight."""
        found = F.embedding(input, self._parameters["weight"], *args, **kwargs)
        padding = kwargs.get("padding_idx", args[0] if args else None)
        owner = self.token_layer
        for name in owner.effective_adapters():
            tokens = owner.adapter_settings[name]
            ordered, order = owner.token_rows[name].index.to(input.device).sort()
            place = torch.searchsorted(ordered, input.contiguous().to(ordered.dtype))
            place = place.clamp(max=len(ordered) - 1)
            # The row of padding gets no gradient, as in the layer's own weight.
            still = tokens.index(padding) if padding in tokens else None
            rows = F.embedding(order[place], owner.trainable_tokens_delta[name], still)
            hit = (ordered[place] == input).unsqueeze(-1)
            found = torch.where(hit, rows.to(found.dtype), found)
        return found


class _MultipliesRows(_WithRows):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's output ``(..., out)``, of which trained rows have their own."""
        layer: Any = self
        owner = self.token_layer
        names = owner.effective_adapters()
        if not names or not has_standard_forward(layer):
            changed: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return changed
        with self.own_forward():
            output: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        x = args[0] if args else next(iter(kwargs.values()))
        for name in names:
            index = owner.token_rows[name].index.to(x.device)
            rows = owner.trainable_tokens_delta[name].to(x.dtype)
            bias = None if layer.bias is None else layer.bias[index].to(x.dtype)
            # In place: logits are the largest tensors there are.
            output.index_copy_(-1, index, F.linear(x, rows, bias).to(output.dtype))
        return output


class TokenEmbedding(_LooksUpRows, TokenLayer):
    """An embedding of which some rows train."""


class TokenLinear(_MultipliesRows, TokenLayer):
    """A linear layer of which some rows train: an output layer with a weight of its own."""


class TiedRows(_WithRows):
    """A layer that shares its weight with a :class:`TokenLayer`, and so the rows that it trains.

    It holds nothing itself.
    """

    label = "Tied"

    @property
    def token_layer(self) -> TokenLayer:  # type: ignore[override]
        """The layer that holds the rows."""
        held: TokenLayer = self.__dict__["rows_of"]
        return held

    def weight_is_stored(self) -> bool:
        """Whether no adapter changes what the weight does."""
        return super().weight_is_stored() and not self.token_layer.effective_adapters()

    def weight_as_now(
        self, compute: Callable[[], Tensor]
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """As of the layer that holds the rows."""
        return self.token_layer.weight_as_now(compute)

    def effective_weight(self) -> Tensor:
        """Returns the weight with the rows of the running adapters."""
        return self.token_layer.effective_weight()


class TiedEmbedding(_LooksUpRows, TiedRows):
    """An embedding that shares its weight with one of which rows train."""


class TiedLinear(_MultipliesRows, TiedRows):
    """An output layer that shares its weight with an embedding of which rows train."""


class _Made:
    """PEFT's tensors for an adapter, in the form in which :func:`attach` takes them."""

    def __init__(self, layer: nn.Module, name: str, tokens: list[int]) -> None:
        made = TrainableTokensLayer(layer, name)
        with without_adapters(layer) if isinstance(layer, TokenLayer) else nullcontext():
            made.update_layer(name, token_indices=tokens)
        self.token_indices = made.token_indices
        self.trainable_tokens_delta = made.trainable_tokens_delta
        original = made.trainable_tokens_original[name]
        index = torch.tensor(tokens, device=original.device)
        self.token_rows = {name: TokenRows(index, original)}


def attach_tokens(layer: nn.Module, name: str, tokens: list[int], tied: list[nn.Module]) -> None:
    """Lets the rows ``tokens`` of ``layer`` train, in the layers ``tied`` to it too."""
    kind = TokenEmbedding if isinstance(layer, nn.Embedding) else TokenLinear
    attach(layer, kind, _Made(layer, name, tokens), name)
    for other in tied:
        if not isinstance(other, TiedRows):
            embeds = isinstance(other, nn.Embedding)
            add_mixin(other, TiedEmbedding if embeds else TiedLinear)
            # Not as a submodule: it has its place in the module.
            other.__dict__["rows_of"] = layer


def untie_rows(module: nn.Module) -> None:
    """Gives layers that follow a :class:`TokenLayer` back the classes that they had."""
    for child in module.modules():
        for kind in (TiedEmbedding, TiedLinear):
            if isinstance(child, kind):
                remove_mixin(child, kind)
                del child.__dict__["rows_of"]


def token_tensors(part: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns the trained rows of an adapter on ``part`` by PEFT's keys in files."""
    return {
        f"{layer_name}.{key}": param
        for layer_name, layer in part.named_modules()
        if isinstance(layer, TokenLayer) and name in layer.adapter_settings
        for key, param in layer.adapter_tensors(name).items()
    }


def trained_rows(part: nn.Module) -> dict[str, set[int]]:
    """Returns the rows that adapters on ``part`` train, by layer, tied ones included."""
    return {
        name: {row for rows in layer.token_layer.adapter_settings.values() for row in rows}
        for name, layer in part.named_modules()
        if isinstance(layer, (TokenLayer, TiedRows))
    }

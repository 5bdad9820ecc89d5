"""Attention of packed rows with memory linear in their length.

A dense mask of a packed row holds mostly ``-inf``, and kernels with a mask compute all of it. What
such a mask says fits in the lengths of the examples. :class:`PackedMask` is a tensor for models,
with the shape of the dense one, which exists only for code that looks at its values. torch's
``scaled_dot_product_attention`` gets the examples one by one instead, or several of like length as
a batch: on CPUs, its kernel spends more time on short rows than their products take.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.compat.torch import (
    make_wrapper_subclass,
    softmax_backward,
    tree_map,
    without_torch_function,
)
from lightning_peft.engine.backends.layers import output_dtype
from lightning_peft.engine.layers.fused import is_transformed
from lightning_peft.engine.layers.operation_contexts import paused_recording, without_autocast
from lightning_peft.engine.layers.weight_view import METADATA

# Another dtype or device, and what a loader does to a batch.
_MOVES = {
    *(getattr(Tensor, name) for name in ("to", "cpu", "cuda", "pin_memory", "detach", "clone")),
    *(getattr(Tensor, name) for name in ("float", "double", "half", "bfloat16")),
}
# Shorter examples are padded to the longest of a batch, by a third at most.
_LEAST_SHARE = 0.75
# Queries whose scores exist at a time, about, and tokens in a batch of examples.
_QUERIES, _TOKENS = 160, 2048
# Above, torch's kernel for one example at a time is as fast on CPUs.
_LONG = 1024


class PackedMask(Tensor):
    """The mask of packed rows: 0 where a token attends to its own example's past, else ``-inf``.

    ``(rows, 1, length, length)``, added to the scores.

    Attributes:
        lengths: Tokens of the examples of each row; padding is an example of its own.
    """

    lengths: Sequence[Sequence[int]]
    _storage: torch.UntypedStorage
    _dense: Tensor | None
    _batches: list[Batch] | None

    @staticmethod
    def __new__(
        cls: type[PackedMask],
        lengths: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PackedMask:
        """Returns a mask without storage.

        Args:
            cls: The class.
            lengths: Tokens of the examples of each row; all rows have as many tokens.
            dtype: Floating.
            device: Where the dense mask would be.
        """
        length = sum(lengths[0])
        shape = torch.Size((len(lengths), 1, length, length))
        mask: PackedMask = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.lengths, mask._dense, mask._batches = lengths, None, None
        # For code that counts the bytes of inputs.
        mask._storage = torch.UntypedStorage(0)
        return mask

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Workers of a loader send it to the process that trains.
        return PackedMask, (self.lengths, self.dtype, self.device)

    def __deepcopy__(self, memo: Any) -> PackedMask:
        return PackedMask(self.lengths, self.dtype, self.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers what is known, computes attention by examples, makes values for the rest."""
        kwargs = kwargs or {}
        if func in METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        if func is Tensor.untyped_storage:
            return args[0]._storage
        if func in _MOVES:
            mask = args[0]
            with without_torch_function():
                like = func(
                    torch.empty(0, dtype=mask.dtype, device=mask.device), *args[1:], **kwargs
                )
            return PackedMask(mask.lengths, like.dtype, like.device)
        if func is F.scaled_dot_product_attention:
            out = _attention(*args, **kwargs)
            if out is not None:
                return out
        return func(*tree_map(_densified, args), **tree_map(_densified, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The same for calls that come from C++."""
        return func(*tree_map(_densified, args), **tree_map(_densified, kwargs or {}))

    def dense(self) -> Tensor:
        """Returns the mask with values."""
        if self._dense is None:
            with without_torch_function():
                device, dtype, shape = self.device, self.dtype, self.shape
            numbers = [[i for i, n in enumerate(row) for _ in range(n)] for row in self.lengths]
            self._dense = block_causal_mask(torch.tensor(numbers, device=device)).to(dtype)
            assert self._dense.shape == shape
        return self._dense

    @property
    def has_values(self) -> bool:
        """Whether some code asked for the values, which then exist."""
        return self._dense is not None

    def batches(self) -> list[Batch]:
        """Returns the examples in batches of like length, for :class:`PackedAttention`."""
        if self._batches is None:
            self._batches = plan_batches(self.lengths)
        return self._batches


def _densified(value: Any) -> Any:
    return value.dense() if isinstance(value, PackedMask) else value


def block_causal_mask(example_ids: Tensor) -> Tensor:
    """Returns the mask, ``(batch, 1, length, length)``, float32: 0 in a token's own past, or -inf.

    ``example_ids`` is the number of the example of each token, ``(batch, length)``.
    """
    length = example_ids.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=example_ids.device).tril()
    allowed = (example_ids[:, None, :, None] == example_ids[:, None, None, :]) & past
    mask = torch.zeros(allowed.shape, device=example_ids.device)
    return mask.masked_fill_(~allowed, float("-inf"))


class Batch(NamedTuple):
    """Examples of like length.

    Attributes:
        length: Tokens of the longest.
        lengths: Tokens of each.
        tokens: Places of their tokens among all, ``(examples * length,)``, int64; those of an
            example's padding are its last one's.
        slots: Where the tokens themselves are in ``tokens``, int64.
    """

    length: int
    lengths: list[int]
    tokens: Tensor
    slots: Tensor


def plan_batches(lengths: Sequence[Sequence[int]]) -> list[Batch]:
    """Returns the examples of all rows in batches of like length, the longest first."""
    starts = [0, *accumulate(n for row in lengths for n in row)]
    sizes = [n for row in lengths for n in row]
    order = sorted((i for i, n in enumerate(sizes) if n), key=lambda i: -sizes[i])
    groups: list[list[int]] = []
    for i in order:
        group = groups[-1] if groups else []
        longest = sizes[group[0]] if group else 0
        if sizes[i] < _LEAST_SHARE * longest or (len(group) + 1) * longest > _TOKENS or not group:
            groups.append([i])
        else:
            group.append(i)
    return [_batch([starts[i] for i in group], [sizes[i] for i in group]) for group in groups]


def _batch(starts: list[int], lengths: list[int]) -> Batch:
    longest = lengths[0]
    column = torch.arange(longest)
    size = torch.tensor(lengths)[:, None]
    tokens = torch.tensor(starts)[:, None] + torch.minimum(column, size - 1)
    return Batch(longest, lengths, tokens.flatten(), (column < size).flatten().nonzero()[:, 0])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Returns the attention, or ``None`` where the dense mask is needed; arguments are torch's."""
    if not isinstance(attn_mask, PackedMask) or not _is_covered(query, key, value, attn_mask):
        return None
    if dropout_p or is_causal or is_transformed():
        return None
    dtype = output_dtype(query)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.device.type != "cpu" or max(map(max, attn_mask.lengths)) > _LONG:
        return attend_one_by_one(query, key, value, attn_mask.lengths, scale)
    with without_autocast(query), paused_recording():
        out: Tensor = PackedAttention.apply(query, key, value, attn_mask.batches(), scale)
    return out


def _is_covered(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask) -> bool:
    rows, _, length, _ = mask.shape
    shapes = {query.shape[:-1], key.shape[:-1], value.shape[:-1]}
    return (
        query.ndim == 4
        and len(shapes) == 1
        and (query.shape[0], query.shape[2]) == (rows, length)
        and query.is_floating_point()
    )


def attend_one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[Sequence[int]],
    scale: float,
) -> Tensor:
    """Returns the attention of packed rows by torch's causal attention of each example.

    Query, key and value are ``(rows, heads, length, width)``; ``lengths`` are of the examples.
    """
    rows = []
    for i, row in enumerate(lengths):
        split = [x[i : i + 1].split(list(row), 2) for x in (query, key, value)]
        parts = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            for q, k, v in zip(*split, strict=True)
        ]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


class PackedAttention(torch.autograd.Function):
    """Causal attention within each example, some examples at a time, as products of batches.

    Scores and their softmax are float32 or more, what is multiplied by values and gradients is in
    the dtype of the activations, as in torch's kernels. Only queries, keys and values wait for the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, batches: list[Batch], scale: float
    ) -> Tensor:
        """Returns the attention, ``(rows, heads, length, width of a value)``."""
        ctx.save_for_backward(query, key, value)
        ctx.batches, ctx.scale = batches, scale
        flat = [_by_token(x) for x in (query, key, value)]
        out = torch.empty_like(flat[2])
        for batch in batches:
            q, k, v = (_gather(x, batch) for x in flat)
            wide_q, wide_k = _wide(q) * scale, _wide(k)
            parts = [
                torch.bmm(_weights(wide_q, wide_k, at).to(v.dtype), v[:, : at.stop])
                for at in _blocks(batch)
            ]
            _scatter(out, parts[0] if len(parts) == 1 else torch.cat(parts, 1), batch)
        return _by_row(out, value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradients of query, key and value."""
        saved = ctx.saved_tensors
        with without_autocast(saved[0]):
            flat = [_by_token(x) for x in (*saved, gradients[0].to(saved[2].dtype))]
            totals = [torch.empty_like(x) for x in flat[:3]]
            for batch in ctx.batches:
                given = [_gather(x, batch) for x in flat]
                _clear_padding(given[3], batch)
                for total, part in zip(totals, _gradients(given, batch, ctx.scale), strict=True):
                    _scatter(total, part, batch)
        shaped = [_by_row(total, x) for total, x in zip(totals, saved, strict=True)]
        return *shaped, None, None


def _gradients(given: list[Tensor], batch: Batch, scale: float) -> list[Tensor]:
    """Returns the gradients of queries, keys and values, each ``(examples * heads, length, .)``."""
    q, k, v, of_out = given
    wide_q, wide_k, wide_v, wide_of_out = _wide(q) * scale, _wide(k), _wide(v), _wide(of_out)
    sums: list[Tensor] = []
    of_q = []
    for at in _blocks(batch):
        weights = _weights(wide_q, wide_k, at)
        of_weights = torch.bmm(wide_of_out[:, at], wide_v[:, : at.stop].transpose(1, 2))
        of_scores = softmax_backward(of_weights, weights).mul_(scale).to(q.dtype)
        of_q.append(torch.bmm(of_scores, k[:, : at.stop]))
        parts = [
            torch.bmm(of_scores.transpose(1, 2), q[:, at]),
            torch.bmm(weights.to(q.dtype).transpose(1, 2), of_out[:, at]),
        ]
        if at.stop == batch.length and not sums:
            return [of_q[0], *parts]
        sums = sums or [torch.zeros_like(wide_k), torch.zeros_like(wide_v)]
        for total, part in zip(sums, parts, strict=True):
            total[:, : at.stop] += part
    return [torch.cat(of_q, 1), *(total.to(q.dtype) for total in sums)]


def _weights(wide_q: Tensor, wide_k: Tensor, at: slice) -> Tensor:
    """Returns the weights of the queries ``at``, ``(n, queries, keys up to the last of them)``."""
    scores = torch.bmm(wide_q[:, at], wide_k[:, : at.stop].transpose(1, 2))
    size = at.stop - at.start
    # Added: filling by a mask takes eight times as long.
    scores[:, :, at.start :] += scores.new_full((size, size), float("-inf")).triu_(1)
    return torch.softmax(scores, -1)


def _blocks(batch: Batch) -> list[slice]:
    """Returns queries that are computed together: the later ones need more keys."""
    size = -(-batch.length // max(1, round(batch.length / _QUERIES)))
    starts = range(0, batch.length, size)
    return [slice(start, min(start + size, batch.length)) for start in starts]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_token(x: Tensor) -> Tensor:
    """Returns ``(rows, heads, length, width)`` as ``(rows * length, heads, width)``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _by_row(flat: Tensor, like: Tensor) -> Tensor:
    rows, heads, length, width = like.shape
    return flat.view(rows, length, heads, width).transpose(1, 2)


def _gather(flat: Tensor, batch: Batch) -> Tensor:
    """Returns the tokens of a batch, ``(examples * heads, length, width)``."""
    _, heads, width = flat.shape
    rows = flat.index_select(0, batch.tokens).view(-1, batch.length, heads, width)
    return rows.transpose(1, 2).reshape(-1, batch.length, width)


def _scatter(flat: Tensor, found: Tensor, batch: Batch) -> None:
    """Writes what was computed for a batch to its places in ``flat``."""
    _, heads, width = flat.shape
    rows = found.view(-1, heads, batch.length, width).transpose(1, 2).reshape(-1, heads, width)
    flat.index_copy_(0, batch.tokens[batch.slots], rows[batch.slots])


def _clear_padding(found: Tensor, batch: Batch) -> None:
    by_example = found.view(len(batch.lengths), -1, batch.length, found.shape[-1])
    for example, length in zip(by_example, batch.lengths, strict=True):
        if length < batch.length:
            example[:, length:] = 0

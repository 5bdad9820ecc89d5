"""Causal LM loss and chunked cross-entropy, without a float32 copy of all logits.

transformers turns the logits into float32, lets cross-entropy keep their logarithms, and makes the
gradient in float32 again before it becomes 16 bits: three tensors of four bytes for each token and
word of the vocabulary, in most steps the largest that exist. Here some rows at a time are widened
to float32, and only the logits, which exist anyway, wait for backward, with two numbers for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lightning_peft.compat.torch import FakeTensor
from lightning_peft.compat.transformers import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    own_loss_function,
    reset_loss_function,
)
from lightning_peft.engine.layers.fused import is_transformed
from lightning_peft.engine.selection.parts import output_embeddings

_IGNORED = -100
# Logits that are widened at a time: near a core on CPUs, and enough for a kernel elsewhere.
_CHUNK, _CHUNK_ON_ACCELERATORS = 1 << 19, 1 << 22


def patch_causal_lm_loss(module: nn.Module, parts: list[nn.Module]) -> None:
    """Sets the loss function of the causal language models around or inside adapted parts.

    Only where that is transformers' own; a model with another one keeps it.
    """
    for model in _causal_models(module):
        inside = {id(child) for child in model.modules()}
        if any(id(part) in inside or model in part.modules() for part in parts):
            model.loss_function = causal_lm_loss


def restore_causal_lm_loss(module: nn.Module) -> None:
    """Undoes :func:`patch_causal_lm_loss`."""
    for model in module.modules():
        if own_loss_function(model) is causal_lm_loss:
            reset_loss_function(model)


def has_default_loss(model: PreTrainedModel) -> bool:
    """Whether the loss of ``model`` is transformers' mean over labelled tokens."""
    return model.loss_function in (ForCausalLMLoss, causal_lm_loss)


def _causal_models(module: nn.Module) -> list[Any]:
    models = [child for child in module.modules() if isinstance(child, PreTrainedModel)]
    return [
        model
        for model in models
        if own_loss_function(model) is None and _expects_causal_lm_loss(model)
    ]


def _expects_causal_lm_loss(model: Any) -> bool:
    """Whether ``model`` has transformers' loss of causal language models, by its type."""
    kind = getattr(model, "loss_type", None)
    if kind in LOSS_MAPPING:
        return LOSS_MAPPING[kind] is ForCausalLMLoss
    # transformers takes it for GPT-2, whose class is not named after a loss, with a warning.
    return output_embeddings(model) is not None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = _IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of ``transformers.loss.loss_utils.ForCausalLMLoss``, float32.

    Args:
        logits: ``(batch, length, vocab_size)``.
        labels: ``(batch, length)``, int64; each is predicted by the position before it.
        vocab_size: Words of the vocabulary.
        num_items_in_batch: What the sum is divided by; without it, by the labels that count.
        ignore_index: The label that does not count.
        shift_labels: ``(batch, length)``, the label that each position predicts, instead of
            ``labels``.
        **kwargs: Passed on where transformers' own function computes.
    """
    # Other subclasses than the planner's, such as those of tensor parallelism, compute otherwise.
    known = type(logits) in (Tensor, FakeTensor) and logits.is_floating_point()
    if not known or is_transformed():
        theirs: Any = ForCausalLMLoss
        own: Tensor = theirs(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return own
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total = summed_cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns the cross-entropy, float32, summed over the rows whose target counts.

    Args:
        logits: ``(rows, classes)``.
        targets: ``(rows,)``, int64.
        ignore_index: The target that does not count.
    """
    total: Tensor = SummedCrossEntropy.apply(logits, targets, ignore_index)
    return total


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy, summed over the rows whose target counts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        """Returns the sum, float32; see :func:`summed_cross_entropy`."""
        counts = targets != ignore_index
        # A class that exists, for rows that do not count.
        places = targets.where(counts, 0).unsqueeze(1)
        # Apart, as in log_softmax: in their sum, large logits would swallow the logarithm.
        largest, totals, picked = logits.new_empty(3, len(logits), 1, dtype=torch.float32).unbind()
        for rows, (some, at) in row_chunks(_step(logits), logits, places):
            wide = some.to(torch.float32, copy=True)
            torch.amax(wide, 1, keepdim=True, out=largest[rows])
            torch.gather(wide.sub_(largest[rows]), 1, at, out=picked[rows])
            torch.sum(wide.exp_(), 1, keepdim=True, out=totals[rows])
        ctx.save_for_backward(logits, targets, places, largest, totals)
        ctx.ignore_index = ignore_index
        return (totals.log() - picked).squeeze(1).where(counts, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradient of the logits, in their dtype."""
        logits, targets, places, largest, totals = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For gradients of gradients.
            total = F.cross_entropy(
                logits.float(), targets, ignore_index=ctx.ignore_index, reduction="sum"
            )
            return *torch.autograd.grad(total, logits, gradients[0], create_graph=True), None, None
        scales = gradients[0] * (targets != ctx.ignore_index).unsqueeze(1) / totals
        of_logits = torch.empty_like(logits)
        for rows, (some, at, scale) in row_chunks(_step(logits), logits, places, scales):
            wide = some.to(torch.float32, copy=True).sub_(largest[rows]).exp_()
            wide.scatter_add_(1, at, -totals[rows])
            torch.mul(wide, scale, out=of_logits[rows])
        return of_logits, None, None


@torch.no_grad()
def cross_entropy_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the summed cross-entropy, float32, and its gradient in the dtype of the logits.

    Args:
        logits: ``(rows, classes)``; no gradient is recorded.
        targets: ``(rows,)``, int64; all of them count.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(logits)
    for rows, (some, at) in row_chunks(_step(logits), logits, targets.unsqueeze(1)):
        wide = some.to(torch.float32, copy=True)
        wide.sub_(wide.amax(1, keepdim=True))
        picked = wide.gather(1, at)
        sums = wide.exp_().sum(1, keepdim=True)
        total += (sums.log() - picked).sum()
        wide.scatter_add_(1, at, -sums)
        torch.div(wide, sums, out=gradient[rows])
    return total, gradient


def _step(logits: Tensor) -> int:
    piece = _CHUNK if logits.device.type == "cpu" else _CHUNK_ON_ACCELERATORS
    return max(1, piece // max(1, logits.shape[1]))


def row_chunks(step: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yields ``step`` rows at a time: where they are, and those of each tensor."""
    for start in range(0, len(tensors[0]), step):
        rows = slice(start, start + step)
        yield rows, [tensor[rows] for tensor in tensors]
        if start >= 2 * step and isinstance(tensors[0], FakeTensor):
            # A plan: the third is made while sums over the first two are there. Others take as much
            # and have no values either.
            return

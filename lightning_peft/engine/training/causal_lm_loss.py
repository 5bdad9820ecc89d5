"""Causal LM loss of transformers without a float32 copy of all logits.

transformers turns the logits into float32, lets cross-entropy keep their logarithms, and makes the
gradient in float32 again before it becomes 16 bits: three tensors of four bytes for each token and
word of the vocabulary, in most steps the largest that exist. In its place, :mod:`.cross_entropy`.
"""

from __future__ import annotations

from typing import Any

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
from lightning_peft.engine.training.cross_entropy import summed_cross_entropy

_IGNORED = -100


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

"""Causal LM loss with logits only at labelled positions.

A vocabulary of 128k makes the logits of a thousand tokens larger than all else that a step keeps,
and of instruction data most have no label. Here the model runs up to its head, the head sees the
positions with a label, a few at a time, and each time the gradients are taken at once, so that no
more logits than those of one chunk ever exist.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft import engine
from lightning_peft.compat.torch import is_compiled, version_of
from lightning_peft.data.encoding import IGNORED
from lightning_peft.tasks.padding_free import PaddingFree

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Logits that exist at a time, at least: 32 MB in bfloat16, and as many for their gradient.
CHUNK = 1 << 24
# On a GPU as many as, with their gradient and a float32 copy, take this share of its memory: small
# products leave it idle. The planner counts CHUNK; its margin for GPUs is wider.
_GPU_SHARE, _LOGIT_BYTES = 32, 8
# What a batch may have for the loss to be taken apart; more may mean another loss.
_KNOWN = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}
# The trial of a model takes so many rows and tokens.
_ROWS, _TOKENS = 2, 32


@dataclass
class TokenScores:
    """What a batch gave: mean loss, float32, over its labelled tokens, and how many are right."""

    loss: Tensor
    tokens: int
    correct: Tensor


class TokenLoss:
    """The loss of one model, by parts where that is the model's own loss, else the model's own.

    In parts, the rows of a batch become one row without padding where the model can
    (:class:`~lightning_peft.tasks.padding_free.PaddingFree`).

    What a model does to its logits is read from its config, and tried before it is relied on: on
    a corner of the first batch, logits and loss must be those that the model computes by itself.
    """

    def __init__(self) -> None:
        # None: not tried yet. No reference to the model, which may be copied with this.
        self._chunked: bool | None = None
        # Labels, their shape and version, and their places.
        self._kept: tuple[Tensor, torch.Size, int, Tensor] | None = None
        self.padding_free = PaddingFree()

    def keep_places(self, labels: Tensor, places: Tensor) -> None:
        """Takes the places of the labels of the next batch, which else a GPU is waited for.

        They count for this very tensor, on the device of the model, and until it is changed.
        """
        self._kept = (labels, labels.shape, version_of(labels), places)

    def _places_of(self, labels: Tensor) -> Tensor | None:
        """Returns the places that were found for ``labels`` as they are now."""
        # Changes of inference tensors are not counted.
        if self._kept is None or self._kept[0] is not labels or labels.is_inference():
            return None
        _, shape, version, places = self._kept
        return places if (labels.shape, version_of(labels)) == (shape, version) else None

    def train(self, call: Callable[..., Any], model: PreTrainedModel, batch: Any) -> Tensor:
        """Returns the loss of a batch, a mean over its labelled tokens, with gradients.

        ``call`` runs the model on a batch; the model itself is for its head.
        """
        if not self._can_chunk(call, model, batch):
            own: Tensor = call(**batch).loss
            return own
        hidden, targets = self._inputs(call, model, batch)
        head, after = model.get_output_embeddings(), postprocess_logits(model)
        trained = [param for param in head.parameters() if param.requires_grad]
        loss: Tensor = ChunkedLoss.apply(hidden, targets, _chunk_rows(model), head, after, *trained)
        return loss

    def evaluate(self, call: Callable[..., Any], model: PreTrainedModel, batch: Any) -> TokenScores:
        """Returns loss and accuracy of a batch, without gradients."""
        with torch.no_grad():
            if not self._can_chunk(call, model, batch):
                return _score_tokens(call(**batch), shift_labels(batch["labels"]))
            hidden, targets = self._inputs(call, model, batch)
            head, after = model.get_output_embeddings(), postprocess_logits(model)
            total = hidden.new_zeros((), dtype=torch.float32)
            correct = hidden.new_zeros((), dtype=torch.int64)
            for _, (some, labels) in engine.row_chunks(_chunk_rows(model), hidden, targets):
                logits = after(head(some))
                correct += (logits.argmax(-1) == labels).sum()
                total += engine.summed_cross_entropy(logits, labels)
            return TokenScores(total / len(targets), len(targets), correct)

    def _inputs(
        self, call: Callable[..., Any], model: PreTrainedModel, batch: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the head's inputs where there is a label, and the labels."""
        batch = self.padding_free.batch(model, batch)
        found = _labelled_inputs(call, model, batch, self._places_of(batch["labels"]))
        self.padding_free.check(model, batch)
        return found

    def _can_chunk(self, call: Callable[..., Any], model: PreTrainedModel, batch: Any) -> bool:
        if not batch.keys() <= _KNOWN or batch["input_ids"].shape[1] < 2:
            return False
        if self._chunked is None:
            reason = _unchunked_reason(model)
            if reason is None and not engine.is_materialized(batch["input_ids"]):
                # A prediction of memory: there are no numbers to compare.
                return True
            reason = reason or _probe(call, model, batch)
            self._chunked = reason is None
            if reason is not None:
                log.info(
                    "%s computes its own loss, with the logits of all tokens: %s.",
                    type(model).__name__,
                    reason,
                )
        return self._chunked


def chunked_loss(model: PreTrainedModel, batch: Any) -> Tensor:
    """Returns the loss of a model that no task holds, as the tasks compute it."""
    return TokenLoss().train(model, model, batch)


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy behind a head; gradients are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        rows: int,
        head: nn.Module,
        after: Callable[[Tensor], Tensor],
        *trained: Tensor,
    ) -> Tensor:
        """Returns the mean, float32, behind ``head`` and ``after``, in chunks of ``rows`` tokens.

        ``hidden`` is ``(tokens, width)``, ``targets`` ``(tokens,)``; ``trained`` are of the head.
        """
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(trained)
        for place, (some, labels) in engine.row_chunks(rows, hidden, targets):
            part = some.detach().requires_grad_(of_hidden is not None)
            with torch.enable_grad():
                logits = after(head(part))
            loss, gradient = engine.cross_entropy_and_gradient(logits.detach(), labels)
            total += loss
            sources = [part, *trained] if of_hidden is not None else [*trained]
            gradients = _gradients(logits, sources, gradient)
            if of_hidden is not None:
                of_hidden[place] = gradients.pop(0)
            sums = [_accumulate(held, more) for held, more in zip(sums, gradients, strict=True)]
            # Else they would still be there when those of the next chunk are made.
            del logits, gradient
        ctx.count, ctx.dtypes = max(1, len(targets)), [param.dtype for param in trained]
        ctx.save_for_backward(of_hidden, *sums)
        return total / len(targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradients of the head's input and of its trained parameters."""
        # Sums until here: in float16, the shares of a mean over thousands of tokens vanish.
        scale = gradients[0] / ctx.count
        of_hidden, *sums = (
            None if held is None else _scaled(held, scale) for held in ctx.saved_tensors
        )
        of_trained = [
            None if held is None else held.to(dtype)
            for held, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return of_hidden, None, None, None, None, *of_trained


def _scaled(held: Tensor, scale: Tensor) -> Tensor:
    # With a dimension: a scalar on a GPU is rounded to the dtype of ``held`` first, where one over
    # the count is off by up to 0.4 %, and a loss scale is infinite.
    return torch.mul(held, scale.to(held.device).reshape(1), out=torch.empty_like(held))


def _gradients(logits: Tensor, sources: list[Tensor], gradient: Tensor) -> list[Any]:
    if not sources:
        return []
    # An adapter that does not run is among the parameters of the head too.
    return list(torch.autograd.grad(logits, sources, gradient, allow_unused=True))


def _accumulate(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Returns the sum, in float32 or more: that of many chunks in bfloat16 would lose the last."""
    if more is None:
        return total
    more = more.to(torch.promote_types(more.dtype, torch.float32))
    return more if total is None else total.add_(more)


def _chunk_rows(model: PreTrainedModel) -> int:
    """Returns how many tokens a chunk has."""
    classes = getattr(model.get_output_embeddings(), "out_features", None)
    whole = 0
    if model.device.type == "cuda":
        whole = torch.cuda.get_device_properties(model.device).total_memory
    return rows_of_chunk(int(classes or model.config.get_text_config().vocab_size), whole)


def rows_of_chunk(classes: int, gpu_bytes: int) -> int:
    """Returns how many tokens a chunk has, by the size of the whole device.

    Not by what is free: sums of other chunks round otherwise, and a run is to give the same bits.
    """
    most = gpu_bytes // _GPU_SHARE // _LOGIT_BYTES
    logits = max(CHUNK, 1 << max(0, most.bit_length() - 1))
    return max(1, logits // classes)


def _labelled_inputs(
    call: Callable[..., Any], model: PreTrainedModel, batch: Any, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the head's inputs where there is a label, and the labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with _head_input(model, first_only=True) as seen:
        call(**inputs)
    (hidden,) = seen
    targets = shift_labels(batch["labels"]).to(hidden.device)
    if places is None:
        # A GPU has to be waited for: how many there are decides the shape of what follows.
        places = _places(targets)
    places = places.to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, places), targets.index_select(0, places)


def label_places(batch: Any) -> Tensor | None:
    """Returns the places of labels in the flat batch, for a device that should not be asked.

    ``None`` for a batch that is not a dictionary with ``(batch, length)`` labels on the CPU.
    """
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.device.type != "cpu":
        return None
    return _places(shift_labels(labels))


def _places(targets: Tensor) -> Tensor:
    return (targets != IGNORED).nonzero().squeeze(-1)


def shift_labels(labels: Tensor) -> Tensor:
    """Returns the label of the token that each position predicts, ``(batch * length,)``."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


@contextmanager
def _head_input(model: PreTrainedModel, first_only: bool) -> Iterator[list[Tensor]]:
    """Notes what the head of ``model`` is given; it may then be made to see one position only."""
    seen: list[Tensor] = []

    def note(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.append(args[0])
        # Contiguous: torch would multiply rows that are apart by a copy of the head for each.
        return (args[0][:, :1].contiguous(), *args[1:]) if first_only else None

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def postprocess_logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Returns the operations of ``model`` on its head's output, by the names of its config."""
    config: Any = model.config.get_text_config()
    times = getattr(config, "logit_scale", None)
    over = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def after(logits: Tensor) -> Tensor:
        if times is not None:
            logits = logits * times
        if over is not None:
            logits = logits / over
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return after


def _unchunked_reason(model: PreTrainedModel) -> str | None:
    """Returns why the loss of ``model`` is known not to be the mean over tokens, or ``None``."""
    if model.get_output_embeddings() is None:
        return "it names no output embeddings"
    if is_compiled(model):
        return "it is compiled as a whole"
    if not engine.has_default_loss(model):
        return "it has a loss function of its own"
    return None


def _probe(call: Callable[..., Any], model: PreTrainedModel, batch: Any) -> str | None:
    """Returns in what the model differs from what :class:`TokenLoss` computes, or ``None``."""
    corner = _probe_batch(batch)
    head, after = model.get_output_embeddings(), postprocess_logits(model)
    devices = [model.device] if model.device.type == "cuda" else []
    inputs = {name: value for name, value in corner.items() if name != "labels"}
    try:
        with torch.no_grad(), engine.in_eval_mode(head):
            # Twice the same random numbers, and none that the run would notice.
            with torch.random.fork_rng(devices):
                output = call(**corner)
            with torch.random.fork_rng(devices), _head_input(model, first_only=True) as seen:
                call(**inputs)
            (hidden,) = seen
            mine, logits = after(head(hidden)).float(), output.logits.float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"it cannot be run without its last layer ({str(error).partition(chr(10))[0]})"
    precision = max(1e-4, 4 * torch.finfo(output.logits.dtype).eps)
    if mine.shape != logits.shape or not (mine - logits).norm() <= precision * logits.norm():
        return "it does more to its logits than its config says"
    targets = shift_labels(corner["labels"])
    # As accurate as the loss may be: torch's own over 49,152 classes is off by 1.5 millionths.
    loss = engine.summed_cross_entropy(logits.flatten(0, 1), targets) / (targets != IGNORED).sum()
    # From the same logits, so that even a small term of its own shows.
    if not (loss - output.loss).abs() <= 1e-5 * loss.abs():
        return f"its loss is not a mean over tokens ({output.loss:.6f}, which would be {loss:.6f})"
    return None


def _probe_batch(batch: Any) -> dict[str, Tensor]:
    """Returns the first tokens of the first rows, with labels on two of three tokens."""
    corner = {name: value[:_ROWS, :_TOKENS] for name, value in batch.items()}
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 4:
        corner["attention_mask"] = mask[:_ROWS, :, :_TOKENS, :_TOKENS]
    elif mask is not None:
        corner["attention_mask"] = torch.ones_like(corner["attention_mask"])
    labels = corner["input_ids"].clone()
    labels[:, ::3] = IGNORED
    return {**corner, "labels": labels}


def _score_tokens(output: Any, targets: Tensor) -> TokenScores:
    """Returns loss and accuracy from the logits of all tokens."""
    targets = targets.to(output.logits.device)
    labelled = targets != IGNORED
    correct = (output.logits.argmax(-1).flatten() == targets) & labelled
    return TokenScores(output.loss, int(labelled.sum()), correct.sum())

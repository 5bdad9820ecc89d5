"""Batches of padded rows as one row without padding, for models that keep its examples apart."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.torch import is_traced
from lightning_peft.data import packing
from lightning_peft.data.encoding import IGNORED
from lightning_peft.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class PaddingFree:
    """Puts the tokens of all rows into one, as packing does, so that padding is not computed.

    Hidden states, labels and so the loss are those of the rows. The model is tried on a short
    packed row before it is relied on; one that would not keep the rows apart gets them padded, and
    so does one on a GPU, where the number of tokens would be waited for.
    """

    def __init__(self) -> None:
        # None: not tried yet. No reference to the model, which may be copied with this.
        self._tried: bool | None = None

    def batch(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a batch as one row, or as it is.

        Args:
            model: A causal language model.
            batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, length)``, and no
                more; rows are padded at their end.
        """
        lengths = _lengths(batch)
        if lengths is None or not self._can(model, max(lengths)):
            return batch
        labels = batch["labels"].clone()
        # No token of the row before predicts it.
        labels[:, 0] = IGNORED
        kept = batch["attention_mask"].bool()
        positions = torch.arange(kept.shape[1]).expand(kept.shape)
        return {
            "input_ids": batch["input_ids"][kept][None],
            "attention_mask": engine.PackedMask([lengths], model.dtype),
            "position_ids": positions[kept][None],
            "labels": labels[kept][None],
        }

    def _can(self, model: PreTrainedModel, longest: int) -> bool:
        if self._tried is None and is_traced(model):
            # Each length would be compiled.
            self._tried = False
        if self._tried is None:
            try:
                packing.check_model(model, 1)
                self._tried = True
            except UnsupportedError as error:
                self._tried = False
                log.info("Padding is computed too: %s", error)
        return self._tried and packing.sees_all(model, longest)


def _lengths(batch: dict[str, Tensor]) -> list[int] | None:
    """Returns the tokens of each row, or ``None`` where the batch has no padding to leave out."""
    if batch.keys() != {"input_ids", "attention_mask", "labels"}:
        return None
    mask, labels = batch["attention_mask"], batch["labels"]
    known = mask.ndim == 2 and mask.device.type == "cpu" and engine.is_materialized(mask)
    if not known or engine.is_transformed() or bool(mask.all()):
        return None
    kept = mask.bool()
    at_end = bool((kept[:, 1:] <= kept[:, :-1]).all())
    if not at_end or not kept.any() or bool((labels[~kept] != IGNORED).any()):
        return None
    return [int(n) for n in kept.sum(1)]

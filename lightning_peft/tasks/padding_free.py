"""Padding-free batches: padded rows as one row, for models that separate examples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.torch import is_traced
from lightning_peft.data import packing
from lightning_peft.data.encoding import IGNORED
from lightning_peft.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# What configs call the longest row: some models hold a table of it.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


class PaddingFree:
    """Puts the tokens of all rows into one, as packing does, so that padding is not computed.

    Hidden states, labels and so the loss are those of the rows. The model is tried on a short
    packed row before it is relied on; one that would not keep the rows apart gets them padded, and
    so do one on a GPU, where the number of tokens would be waited for, and one whose attention
    makes the mask of all tokens squared, which grows with the number of rows. No row gets longer
    than the positions of the model: then there are several.
    """

    def __init__(self) -> None:
        # None: not tried yet. No reference to the model, which may be copied with this.
        self._tried: bool | None = None
        # By mode, that of training or not: attention may have dropout.
        self._by_examples: dict[bool, bool] = {}

    def batch(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns a batch as one row or a few, or as it is.

        Only one of ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, length)``,
        padded at their end, is changed.
        """
        if not _covers(batch):
            return batch
        lengths = _lengths(batch)
        # Where processes share weights, each tries, also one whose first batch has no padding.
        if (lengths is None and not engine.is_sharded(model)) or not self._can(model):
            return batch
        if lengths is None or not packing.sees_all(model, max(lengths)):
            return batch
        groups = _groups(lengths, max(max(lengths), _positions(model)))
        longest = max(sum(lengths[i] for i in group) for group in groups)
        if len(groups) * longest >= batch["labels"].numel():
            return batch
        examples = [
            {name: batch[name][i, :n] for name in ("input_ids", "labels")}
            for i, n in enumerate(lengths)
        ]
        return packing.to_model(
            packing.collate([[examples[i] for i in group] for group in groups], 0), model
        )

    def check(self, model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        """Looks at a batch that was run: if attention made the mask, later ones are padded."""
        mask = batch.get("attention_mask")
        if isinstance(mask, engine.PackedMask) and mask.has_values:
            self._by_examples[model.training] = False

    def _can(self, model: PreTrainedModel) -> bool:
        if self._tried is None:
            # Compiled, there would be a graph for each length.
            self._tried = not is_traced(model) and self._keeps_apart(model)
        if not self._tried:
            return False
        if model.training not in self._by_examples:
            self._by_examples[model.training] = not self._makes_mask(model)
        return self._by_examples[model.training]

    def _keeps_apart(self, model: PreTrainedModel) -> bool:
        try:
            packing.check_model(model, 1)
        except UnsupportedError as error:
            log.info("Padding is computed too: %s", error)
            return False
        return True

    def _makes_mask(self, model: PreTrainedModel) -> bool:
        try:
            made = packing.makes_mask(model)
        except Exception as error:
            log.info("Padding is computed too: a packed row cannot be run: %s", error)
            return True
        if made:
            log.info(
                "Padding is computed too: attention in %s needs the mask of all tokens squared "
                "(attn_implementation='eager', attention dropout, or code of its own).",
                type(model).__name__,
            )
        return made


def _positions(model: PreTrainedModel) -> int:
    """Returns how many positions a row may have by the config, 0 if it says nothing."""
    config = model.config.get_text_config()
    known = [getattr(config, name, None) for name in _POSITIONS]
    return min((n for n in known if isinstance(n, int) and n > 0), default=0)


def _groups(lengths: list[int], most: int) -> list[list[int]]:
    """Returns which rows become one, of at most ``most`` tokens, all of about as many."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    count = -(-sum(lengths) // most)
    while True:
        groups: list[list[int]] = [[] for _ in range(count)]
        sums = [0] * count
        for i in order:
            emptiest = sums.index(min(sums))
            groups[emptiest].append(i)
            sums[emptiest] += lengths[i]
        if max(sums) <= most:
            return [sorted(group) for group in groups]
        count += 1


def _covers(batch: dict[str, Tensor]) -> bool:
    """Whether a batch is of the kind that may have padding to leave out."""
    if batch.keys() != {"input_ids", "attention_mask", "labels"} or engine.is_transformed():
        return False
    mask = batch["attention_mask"]
    return mask.ndim == 2 and mask.device.type == "cpu" and engine.is_materialized(mask)


def _lengths(batch: dict[str, Tensor]) -> list[int] | None:
    """Returns the tokens of each row, or ``None`` where the batch has no padding to leave out."""
    mask, labels = batch["attention_mask"], batch["labels"]
    if bool(mask.all()):
        return None
    kept = mask.bool()
    at_end = bool((kept[:, 1:] <= kept[:, :-1]).all())
    if not at_end or not kept.any() or bool((labels[~kept] != IGNORED).any()):
        return None
    return [int(n) for n in kept.sum(1)]

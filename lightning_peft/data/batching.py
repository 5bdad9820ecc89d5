"""Padding of batches, and sampling of rows grouped by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_peft.data.encoding import IGNORED

# Rows are sorted by length among so many batches: enough to save padding, and few enough that
# the order stays random.
BATCHES_SORTED_TOGETHER = 50


def pad_to_longest(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Returns ``rows`` of different lengths as ``(rows, length)``, int64, padded with ``value``."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def pad_inputs(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns ``input_ids``, ``attention_mask`` and any ``token_type_ids``, ``(batch, length)``."""
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad_to_longest(ids, pad_token_id),
        "attention_mask": pad_to_longest([[1] * len(row) for row in ids], 0),
    }
    if rows[0].get("token_type_ids"):
        batch["token_type_ids"] = pad_to_longest([row["token_type_ids"] for row in rows], 0)
    return batch


def pad_left(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns ``input_ids`` and ``attention_mask``, ``(prompts, length)``, padded on the left."""
    length = max(map(len, prompts))
    gaps = [length - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * gap + [*prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (length - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns the tensors of :func:`pad_inputs`, and ``labels``, padded with -100."""
    labels = pad_to_longest([row["labels"] for row in rows], IGNORED)
    return {**pad_inputs(rows, pad_token_id), "labels": labels}


class LengthGroupedSampler(DistributedSampler[int]):
    """Draws rows in random order, with rows of similar length next to each other.

    The order depends on ``seed`` and the epoch alone, so that a resumed run sees the same.
    Lightning replaces any sampler but ``DistributedSampler`` where there are several processes.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, num_replicas: int, rank: int
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        """Yields the rows of this process in the order of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        together = self.batch_size * self.num_replicas
        parts = torch.randperm(len(self.lengths), generator=generator).split(
            together * BATCHES_SORTED_TOGETHER
        )
        # Stable: rows of one length stay in random order.
        order = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in parts])
        # A smaller batch would shift the borders of all that come after it.
        full = order[: len(order) // together * together].view(-1, together)
        mixed = full[torch.randperm(len(full), generator=generator)].flatten()
        rows = torch.cat([mixed, order[len(mixed) :]])
        # The first ones come once more where the processes would have unequal numbers of rows.
        places = torch.arange(self.rank, self.total_size, self.num_replicas) % len(rows)
        return iter(rows[places].tolist())

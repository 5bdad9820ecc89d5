"""Batches of padded rows, and an order in which rows of like length come together."""

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


def pad(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of rows of different lengths.

    Args:
        rows: ``input_ids`` and ``labels`` of each.
        pad_token_id: Token that fills up short rows, which is neither attended to nor trained.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, length)``, int64.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(length) < lengths[:, None]).to(torch.int64)
    ids, labels = filled("input_ids", pad_token_id), filled("labels", IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class LengthGroupedSampler(DistributedSampler[int]):
    """Draws rows in random order, with rows of like length next to each other.

    The order depends on the seed and the epoch alone, so that a resumed run sees the same. It
    derives from ``DistributedSampler`` because Lightning replaces any other sampler when there are
    several processes, and would mix the lengths again.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows per batch and process.
        seed: Seed of the order.
        num_replicas: Number of processes.
        rank: Number of this process.
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
        batches: list[Tensor] = []
        for part in torch.randperm(len(self.lengths), generator=generator).split(
            together * BATCHES_SORTED_TOGETHER
        ):
            # Stable: rows of one length stay in random order.
            order = part[self.lengths[part].argsort(stable=True)]
            batches += order.split(together)
        # A smaller batch would shift the borders of all that come after it.
        full = [batch for batch in batches if len(batch) == together]
        rest = [batch for batch in batches if len(batch) < together]
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator)] + rest
        rows = torch.cat(mixed).tolist()
        rows += (rows * self.total_size)[: self.total_size - len(rows)]
        return iter(rows[self.rank : self.total_size : self.num_replicas])

"""Ranking metrics: retrieval over a whole split, and rank correlation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.sentence_folder import Similarity
from lightning_peft.tasks.embedding_losses import similarities

# Anchors that are compared with all documents at a time.
_CHUNK = 1024


class Retrieval(Metric):
    """``accuracy`` (the positive is the first) and ``mrr``, the mean of 1 / its rank.

    Each anchor is compared with every different document of the split, positives and negatives of
    all rows. Other positives of an equal anchor, and texts equal to the anchor, are left out. A
    pair that comes twice, also from another process, counts once. Of equally similar documents the
    positive comes last.
    """

    full_state_update = False
    _STATES = ("anchors", "documents", "anchor_digests", "document_digests", "positive_digests")

    def __init__(self, similarity: Similarity = "cosine", **options: Any) -> None:
        super().__init__(**options)
        self.similarity = similarity
        for name in self._STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, anchors: Tensor, documents: Tensor, anchor_digests: Tensor, document_digests: Tensor
    ) -> None:
        """Adds a batch: ``(rows, dimension)``, positives and then negatives, and digests."""
        values = (anchors, documents, anchor_digests, document_digests)
        given = (*values, document_digests[: len(anchors)])
        for name, value in zip(self._STATES, given, strict=True):
            getattr(self, name).append(value.detach())

    def compute(self) -> dict[str, Tensor]:
        """Returns ``accuracy`` and ``mrr``."""
        parts: Any = [dim_zero_cat(getattr(self, name)) for name in self._STATES]
        anchors, documents, of_anchor, of_document, of_positive = parts
        candidates, where = _different(of_document)
        documents = documents[where]
        _, rows = _different(torch.stack([of_anchor, of_positive], dim=1))
        anchors, of_anchor, of_positive = anchors[rows], of_anchor[rows], of_positive[rows]
        ranks = []
        for place in range(0, len(anchors), _CHUNK):
            chunk = slice(place, place + _CHUNK)
            scores = similarities(anchors[chunk], documents, self.similarity)
            own = candidates[None, :] == of_positive[chunk, None]
            score = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
            others = candidates[None, :] == of_anchor[chunk, None]
            others |= _known(of_anchor[chunk], candidates, of_anchor, of_positive)
            # A similarity that is not a number has found nothing.
            ranks.append((~(scores < score) & ~others & ~own).sum(dim=1) + 1)
        found = torch.cat(ranks)
        return {"accuracy": (found == 1).float().mean(), "mrr": (1 / found.float()).mean()}


class RankCorrelation(Metric):
    """Spearman's rank correlation of what was found with what was expected, over a whole split.

    torchmetrics' class for it warns of the memory that it takes: 8 bytes per pair.
    """

    full_state_update = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("found", "expected"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, found: Tensor, expected: Tensor) -> None:
        """Adds pairs, ``(pairs,)`` each."""
        for name, value in (("found", found), ("expected", expected)):
            getattr(self, name).append(value.detach().float())

    def compute(self) -> Tensor:
        """Returns the correlation, from -1 to 1; not a number where one of both is constant."""
        parts: Any = (dim_zero_cat(getattr(self, name)) for name in ("found", "expected"))
        return spearman_corrcoef(*parts)


def _different(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the different values, sorted, and where each is first."""
    unique, inverse = torch.unique(values, dim=0, return_inverse=True)
    places = torch.arange(len(values), device=values.device)
    first = places.new_full((len(unique),), len(values))
    return unique, first.scatter_reduce(0, inverse, places, "amin")


def _known(anchors: Tensor, candidates: Tensor, all_anchors: Tensor, positives: Tensor) -> Tensor:
    """Returns which candidates are positives of equal anchors, ``(anchors, candidates)``, bool."""
    same = anchors[:, None] == all_anchors[None, :]
    several = same.sum(dim=1) > 1
    found = torch.zeros(len(anchors), len(candidates), dtype=torch.bool, device=anchors.device)
    for row in several.nonzero().flatten().tolist():
        found[row] = torch.isin(candidates, positives[same[row]])
    return found

"""Losses of sentence embeddings, equal to those of sentence-transformers.

``MultipleNegativesRankingLoss`` (InfoNCE; arXiv 1705.00652, 1807.03748), ``CoSENTLoss`` and
``CosineSimilarityLoss``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lightning_peft.sentence_folder import Similarity


def similarities(first: Tensor, second: Tensor, similarity: Similarity) -> Tensor:
    """Returns how similar each of ``(n, dimension)`` is to each of ``(m, dimension)``."""
    if similarity == "cosine":
        first, second = normalize(first, dim=-1), normalize(second, dim=-1)
    return first @ second.T


def pair_similarities(first: Tensor, second: Tensor, similarity: Similarity) -> Tensor:
    """Returns how similar the embeddings of each pair are, ``(pairs,)``."""
    if similarity == "cosine":
        return cosine_similarity(first, second)
    return (first * second).sum(-1)


def false_negatives(anchors: Tensor, documents: Tensor) -> Tensor:
    """Returns which documents must not be negatives of an anchor, ``(rows, documents)``, bool.

    These are texts equal to the anchor, and to a positive of an equal anchor, wherever they stand
    in the batch. An anchor's own positive is not among them. ``anchors`` and ``documents``, the
    positives in the order of the anchors, then all negatives, are digests.
    """
    rows = len(anchors)
    same_anchor = anchors[:, None] == anchors[None, :]
    same_document = documents[:rows, None] == documents[None, :]
    found = (same_anchor.float() @ same_document.float() > 0) | (
        anchors[:, None] == documents[None, :]
    )
    found[:, :rows].fill_diagonal_(False)
    return found


def ranking_loss(
    anchors: Tensor,
    documents: Tensor,
    left_out: Tensor,
    scale: float,
    similarity: Similarity = "cosine",
    symmetric: bool = False,
) -> Tensor:
    """Returns the loss of each anchor: cross-entropy of its positive among all documents.

    Args:
        anchors: ``(rows, dimension)``, float32.
        documents: ``(documents, dimension)``: the positives in the order of the anchors, then all
            negatives.
        left_out: ``(rows, documents)``, bool: which of them are not compared.
        scale: What similarities are multiplied by: 1 / temperature.
        similarity: ``"cosine"`` or ``"dot"``.
        symmetric: Also look for the anchor of each positive, and take the mean of both losses.

    Returns:
        ``(rows,)``, in nats.
    """
    rows = len(anchors)
    scores = similarities(anchors, documents, similarity) * scale
    own = scores[:, :rows].diagonal()
    forward = torch.logsumexp(scores.masked_fill(left_out, -torch.inf), dim=1)
    if not symmetric:
        return forward - own
    of_positives = scores[:, :rows].masked_fill(left_out[:, :rows], -torch.inf)
    return (forward + torch.logsumexp(of_positives, dim=0)) / 2 - own


def cosent_loss(found: Tensor, scores: Tensor, scale: float) -> Tensor:
    """Returns CoSENT's loss of a batch of pairs, a scalar: greater scores are more similar.

    ``log(1 + sum(exp(scale * (found[k] - found[i]))))`` over all ``i``, ``k`` with
    ``scores[i] > scores[k]``; similarities ``found`` and ``scores`` are ``(pairs,)``.
    """
    scaled = found * scale
    differences = (scaled[None, :] - scaled[:, None])[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences]), dim=0)

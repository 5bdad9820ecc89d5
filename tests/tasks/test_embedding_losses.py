"""The losses are those of sentence-transformers, and equal texts are left out."""

import math

import pytest
import torch

from lightning_peft.tasks.embedding_losses import (
    cosent_loss,
    false_negatives,
    pair_similarities,
    ranking_loss,
)
from lightning_peft.tasks.retrieval import RankCorrelation, Retrieval

pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers")
WIDTH = 12


@pytest.fixture(scope="module")
def losses():
    from sentence_transformers.sentence_transformer import losses

    return losses


def vectors(count, seed):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=chance).requires_grad_()


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("similarity", "scale"), [("cosine", 20.0), ("cosine", 50.0), ("dot", 1)])
def test_the_ranking_loss_is_theirs(losses, negatives, symmetric, similarity, scale):
    from sentence_transformers.util import cos_sim, dot_score

    rows = 5
    columns = [vectors(rows, seed) for seed in range(2 + negatives)]
    directions = ("query_to_doc", "doc_to_query") if symmetric else ("query_to_doc",)
    theirs = losses.MultipleNegativesRankingLoss(
        None,
        scale=scale,
        similarity_fct=cos_sim if similarity == "cosine" else dot_score,
        directions=directions,
        partition_mode="per_direction" if symmetric else "joint",
    ).compute_loss_from_embeddings(columns, None)
    documents = torch.cat(columns[1:])
    left_out = torch.zeros(rows, len(documents), dtype=torch.bool)
    ours = ranking_loss(columns[0], documents, left_out, scale, similarity, symmetric)
    assert ours.shape == (rows,)
    torch.testing.assert_close(ours.mean(), theirs, rtol=0, atol=1e-5)
    for mine, other in zip(
        gradients(ours.mean(), *columns), gradients(theirs, *columns), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("scores", [[0.1, 0.9, 0.5, 0.9, 0.0], [3, 1, 1, 1, 2], [1, 1, 1, 1, 1]])
def test_cosent_is_theirs(losses, scale, scores):
    first, second, wanted = vectors(5, 1), vectors(5, 2), torch.tensor(scores).float()
    theirs = losses.CoSENTLoss(None, scale).compute_loss_from_embeddings([first, second], wanted)
    ours = cosent_loss(pair_similarities(first, second, "cosine"), wanted, scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    pairs = zip(gradients(ours, first, second), gradients(theirs, first, second), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_texts_that_belong_to_an_anchor_are_no_negatives_of_it():
    anchors = torch.tensor([1, 1, 2, 3])
    # Positives 10, 11, 10 and 12; negatives 11, 2 and 13, of any row.
    documents = torch.tensor([10, 11, 10, 12, 11, 2, 13])
    assert false_negatives(anchors, documents).long().tolist() == [
        [0, 1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_a_batch_with_equal_texts_has_the_loss_without_them():
    anchors, documents = vectors(3, 1).detach(), vectors(3, 2).detach()
    anchors[1], documents[2] = anchors[0], documents[0]
    left_out = false_negatives(torch.tensor([1, 1, 2]), torch.tensor([10, 11, 10]))
    found = ranking_loss(anchors, documents, left_out, 20.0)
    scores = 20 * torch.nn.functional.cosine_similarity(anchors[:, None], documents[None], dim=-1)
    # Row 0 has no negative left at all; row 1 none either; row 2 that of row 1.
    expected = [0.0, 0.0, math.log(1 + math.exp(scores[2, 1] - scores[2, 2]))]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)
    both_ways = ranking_loss(anchors, documents, left_out, 20.0, symmetric=True)
    expected[1] = math.log(1 + math.exp(scores[2, 1] - scores[1, 1])) / 2
    expected[2] = expected[2] / 2
    torch.testing.assert_close(both_ways, torch.tensor(expected), rtol=0, atol=1e-5)


def test_retrieval_is_over_the_whole_split():
    anchors = torch.eye(4)
    documents = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0.5, 0], [0, 0, 0.2, 1], [0, 0, 0.4, 0.5]])
    metric = Retrieval()
    metric.update(anchors[:2], documents[:2], torch.tensor([1, 2]), torch.tensor([11, 12]))
    metric.update(anchors[2:], documents[2:], torch.tensor([3, 4]), torch.tensor([13, 14]))
    # Anchor 3 finds 14 (0.62) and 12 (0.45) before 13 (0.20); anchor 4 finds 13 before 14.
    assert metric.compute() == {"accuracy": 0.5, "mrr": pytest.approx((1 + 1 + 1 / 3 + 1 / 2) / 4)}
    # A row that comes again, as the last ones do in several processes, changes nothing.
    metric.update(anchors[3:], documents[3:], torch.tensor([4]), torch.tensor([14]))
    assert metric.compute()["mrr"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 2) / 4)


def test_retrieval_leaves_other_right_answers_out_and_no_tie_counts_as_found():
    anchors = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])
    documents = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0, 1.0]])
    digests = torch.tensor([11, 12, 13, 14])
    metric = Retrieval()
    metric.update(anchors, documents, torch.tensor([1, 1, 2]), digests)
    found = metric.compute()
    # The second pair would have the first one's positive before its own; the third ties with 14.
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 + 1 / 2) / 3)


def test_similarities_that_are_not_numbers_find_nothing():
    metric, lost = Retrieval(), torch.full((4, 8), torch.nan)
    metric.update(lost, lost, torch.arange(4), torch.arange(10, 14))
    assert metric.compute() == {"accuracy": 0, "mrr": 0.25}


def test_the_order_of_scores_is_compared_and_not_their_values():
    metric = RankCorrelation()
    metric.update(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 5.0]))
    metric.update(torch.tensor([0.4, 0.3]), torch.tensor([100.0, 7.0]))
    assert metric.compute() == pytest.approx(1)

"""Spans in tags, and scores counted by hand."""

import pytest

from lightning_peft.tasks.token_classification import SpanScores, are_spans, spans_of


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-X I-X O", {(0, 2, "X")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("B-X I-X B-Y I-Y I-Y", {(0, 2, "X"), (2, 5, "Y")}),
        # No valid IOB2, as conlleval reads it.
        ("I-X I-X O", {(0, 2, "X")}),
        ("O I-X O I-X", {(1, 2, "X"), (3, 4, "X")}),
        ("B-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}),
        ("B-a-b I-a-b", {(0, 2, "a-b")}),
    ],
)
def test_spans_of_tags(tags, spans):
    assert spans_of(tags.split()) == spans


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["B-X", "I-X", "O"], True),
        (["B-X", "O"], True),
        (["NOUN", "VERB", "O"], False),
        (["I-X", "O"], False),
        (["B-X", "E-X", "I-X", "O", "S-X"], False),
        (["0", "1"], False),
    ],
)
def test_which_tags_write_spans(labels, found):
    assert are_spans(labels) is found


def test_scores_are_those_counted_by_hand():
    metric = SpanScores()
    # Two spans, one found, one with a wrong end.
    metric.update([["B-X", "O", "B-Y", "O"]], [["B-X", "O", "B-Y", "I-Y"]])
    # One span of the wrong kind, one that is none, and one not found.
    metric.update([["B-X", "O", "B-X", "O"], ["O"]], [["B-Y", "O", "O", "O"], ["B-X"]])
    found = {name: float(value) for name, value in metric.compute().items()}
    # 1 of 4 answers is right, 1 of 4 spans is found.
    assert found == {"precision": 1 / 4, "recall": 1 / 4, "f1": 1 / 4}
    metric.update([["B-X", "I-X"]], [["B-X", "I-X"]])
    metric.update([["B-X"]], [["O"]])
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == {
        "precision": pytest.approx(2 / 6),
        "recall": pytest.approx(2 / 5),
        "f1": pytest.approx(2 * (2 / 6) * (2 / 5) / (2 / 6 + 2 / 5)),
    }


def test_without_spans_the_scores_are_zero():
    metric = SpanScores()
    metric.update([["O"]], [["O"]])
    assert {float(value) for value in metric.compute().values()} == {0.0}
    metric.update([["B-X"]], [["B-X"]])
    metric.reset()
    assert int(metric.found) == int(metric.answers) == int(metric.spans) == 0

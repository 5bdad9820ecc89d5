"""How near an answer is to the expected one."""

from dataclasses import asdict

import pytest

from lightning_peft.chat.answer_scores import (
    AnswerScore,
    ScoreSummary,
    is_exact,
    score_answer,
    summarize,
    summarize_rows,
)


@pytest.mark.parametrize(
    ("answer", "expected", "exact"),
    [
        (" It is so.\n", "It  is so.", True),
        ("It is so", "It is so.", False),
        ("it is so.", "It is so.", False),
        ('{"b": [2], "a": 1}', '{"a":1,"b":[2]}', True),
        ('{"a": true}', '{"a": 1}', False),
        ("if x:\n    y()", "if x:\n    y()  ", True),
        ("if x:\n  y()", "if x:\n    y()", False),
        ("a b", "a\nb", False),
        ("", " ", False),
    ],
)
def test_exact_is_the_text_or_equal_json(answer, expected, exact):
    assert is_exact(answer, expected) is exact
    assert score_answer(answer, expected).exact is exact


@pytest.mark.parametrize(
    ("answer", "expected", "valid"),
    [
        ('{"a": 2}', '{"a": 1}', True),
        ("[]", '{"a": 1}', True),
        ('{"a": NaN}', '{"a": 1}', False),
        ('```json\n{"a": 1}\n```', '{"a": 1}', False),
        ('{"a": 1', "[1]", False),
        # A number is JSON too, and nobody asked for JSON here.
        ("4", "4", None),
        ("{x}", "{y}", None),
    ],
)
def test_json_counts_where_json_is_expected(answer, expected, valid):
    assert score_answer(answer, expected).valid_json is valid


@pytest.mark.parametrize(
    ("answer", "expected", "overlap"),
    [
        ("the cat sat", "The cat sat", 1),
        ("a b c d", "a b", 2 * 2 / 6),
        # Words count as often as they are there.
        ("yes yes yes", "yes", 2 * 1 / 4),
        ("no", "yes", 0),
        ("", "yes", 0),
        ("", "", 1),
        # No spaces between words.
        ("\u6771\u4eac", "\u6771\u4eac\u90fd", 2 * 2 / 5),
        ("f(x)", "f(y)", 2 * 3 / 8),
    ],
)
def test_overlap_is_the_f1_of_words(answer, expected, overlap):
    assert score_answer(answer, expected).token_overlap == pytest.approx(overlap)


def test_scores_are_summed_up_by_model():
    scores = [AnswerScore(True, True, 1.0), AnswerScore(False, False, 0.5)]
    scores += [AnswerScore(False, None, 0.0)]
    assert summarize(scores) == ScoreSummary(3, 1, 2, 1, 0.5)
    assert summarize([]) == ScoreSummary(0, 0, 0, 0, 0.0)
    rows = [{"scores": {"base": asdict(one), "mine": asdict(scores[0])}} for one in scores]
    found = summarize_rows([*rows, {"prompt": "of no reference"}])
    assert found == {"base": summarize(scores), "mine": ScoreSummary(3, 3, 3, 3, 1.0)}

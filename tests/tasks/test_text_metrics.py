"""Metrics of text, against what is counted by hand."""

import pytest

from lightning_peft.tasks.encoder_decoder import METRICS, named, update

# Of 4 words generated and 5 expected 3 are right, in order ("the cat ... mat"); one pair of
# neighbours ("the cat") is right of 3 and 4.
GENERATED, EXPECTED = "the cat his mat", "the cat on the mat"


def value(name, generated, expected):
    metric = METRICS[name]()
    update(metric, generated, expected)
    return metric.compute()


def test_rouge_by_hand():
    found = named(value("rouge", [GENERATED], [EXPECTED]))
    assert found.keys() == {"rouge1", "rouge2", "rougeL"}
    assert found["rouge1"].item() == pytest.approx(2 * 3 / (4 + 5))
    assert found["rouge2"].item() == pytest.approx(2 * 1 / (3 + 4))
    assert found["rougeL"].item() == pytest.approx(2 * 3 / (4 + 5))


def test_rouge_reads_every_alphabet():
    found = named(value("rouge", ["Привет, мир!"], ["привет мир"]))
    assert found["rouge2"].item() == 1
    assert named(value("rouge", ["größer"], ["großer"]))["rouge1"].item() == 0


def test_error_rates_by_hand():
    # One substitution and one deletion in 5 words; over two rows, 2 of 8.
    assert value("wer", [GENERATED], [EXPECTED]).item() == pytest.approx(2 / 5)
    both = value("wer", [GENERATED, "a b c"], [EXPECTED, "a b c"])
    assert both.item() == pytest.approx(2 / 8)
    assert value("cer", ["abcd"], ["abxde"]).item() == pytest.approx(2 / 5)


def test_translation_by_hand():
    assert value("bleu", ["a b c d e"], ["a b c d e"]).item() == pytest.approx(1)
    # 5, 4, 3, 2 of the n-grams for n = 1..4 of 6, 5, 4, 3 are right, and nothing is too short.
    parts = (5 / 6) * (4 / 5) * (3 / 4) * (2 / 3)
    assert value("bleu", ["a b c d e x"], ["a b c d e f"]).item() == pytest.approx(parts**0.25)
    # Of the n-grams of characters for n = 1..6, all but the last of each length.
    shares = [6 / 7, 5 / 6, 4 / 5, 3 / 4, 2 / 3, 1 / 2]
    found = value("chrf", ["abcdefx"], ["abcdefg"]).item()
    assert found == pytest.approx(sum(shares) / 6)

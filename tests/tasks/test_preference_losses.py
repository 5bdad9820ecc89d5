"""The losses against their formulas, written out with Python's own numbers."""

from math import exp, log

import pytest
import torch

from lightning_peft.tasks.preference_losses import (
    answer_log_probabilities,
    dpo,
    kto,
    orpo,
    simpo,
)

POLICY = [-3.0, -40.0, -5.5, -41.0]
REFERENCE = [-4.0, -38.0, -5.0, -45.0]
TOKENS = [4, 11, 3, 9]


def sigmoid(x):
    return 1 / (1 + exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing):
    found = dpo(*map(torch.tensor, (POLICY, REFERENCE, TOKENS)), 0.3, label_smoothing=smoothing)
    for pair in (0, 1):
        chosen, rejected = (0.3 * (POLICY[i] - REFERENCE[i]) for i in (pair, pair + 2))
        right, wrong = sigmoid(chosen - rejected), sigmoid(rejected - chosen)
        loss = -(1 - smoothing) * log(right) - smoothing * log(wrong)
        assert found["loss"][pair].item() == pytest.approx(loss, rel=1e-5)
        assert found["margin"][pair].item() == pytest.approx(chosen - rejected, rel=1e-5)
        assert found["chosen_reward"][pair].item() == pytest.approx(chosen, rel=1e-5)
        assert found["rejected_reward"][pair].item() == pytest.approx(rejected, rel=1e-5)
    # The first pair gains 1.0 and 0.5 less; the second loses 2.0 and gains 4.0.
    assert found["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "loss_of"),
    [
        ("hinge", lambda a, b, means: max(0.0, 1 - (a - b))),
        ("ipo", lambda a, b, means: (means[0] - means[1] - 1 / (2 * 0.3)) ** 2),
        ("apo_zero", lambda a, b, means: 1 - sigmoid(a) + sigmoid(b)),
        (
            "robust",
            lambda a, b, means: -(0.9 * log(sigmoid(a - b)) - 0.1 * log(sigmoid(b - a))) / 0.8,
        ),
    ],
)
def test_relatives_of_dpo(kind, loss_of):
    smoothing = 0.1 if kind == "robust" else 0.0
    given = (torch.tensor(one) for one in (POLICY, REFERENCE, TOKENS))
    found = dpo(*given, 0.3, kind, smoothing)
    for pair in (0, 1):
        ratios = [POLICY[i] - REFERENCE[i] for i in (pair, pair + 2)]
        means = [ratio / TOKENS[i] for ratio, i in zip(ratios, (pair, pair + 2), strict=True)]
        loss = loss_of(0.3 * ratios[0], 0.3 * ratios[1], means)
        assert found["loss"][pair].item() == pytest.approx(loss, rel=1e-5)
        assert found["margin"][pair].item() == pytest.approx(0.3 * (ratios[0] - ratios[1]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing):
    found = simpo(torch.tensor(POLICY), torch.tensor(TOKENS), 2.0, 0.7, smoothing)
    for pair in (0, 1):
        chosen, rejected = (2.0 * POLICY[i] / TOKENS[i] for i in (pair, pair + 2))
        past = chosen - rejected - 0.7
        loss = -(1 - smoothing) * log(sigmoid(past)) - smoothing * log(sigmoid(-past))
        assert found["loss"][pair].item() == pytest.approx(loss, rel=1e-5)
        assert found["chosen_reward"][pair].item() == pytest.approx(chosen)
        assert found["accuracy"][pair].item() == float(chosen > rejected)


def test_kto():
    desirable = [True, False, True, False]
    found = kto(
        *map(torch.tensor, (POLICY, REFERENCE, desirable)), torch.tensor(0.8), 0.3, (1.5, 0.5)
    )
    for row, wanted in enumerate(desirable):
        ratio = POLICY[row] - REFERENCE[row]
        gain = ratio - 0.8 if wanted else 0.8 - ratio
        loss = (1.5 if wanted else 0.5) * (1 - sigmoid(0.3 * gain))
        assert found["loss"][row].item() == pytest.approx(loss, rel=1e-5)
        assert found["reward"][row].item() == pytest.approx(0.3 * ratio)
    # Ratios are 1, -2, -0.5 and 4, and the divergence 0.8.
    assert found["accuracy"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_orpo():
    found = orpo(torch.tensor(POLICY), torch.tensor(TOKENS), 0.4)
    for pair in (0, 1):
        means = [exp(POLICY[i] / TOKENS[i]) for i in (pair, pair + 2)]
        chosen, rejected = (p / (1 - p) for p in means)
        ratio = log(chosen / rejected)
        nll = -POLICY[pair] / TOKENS[pair]
        loss = nll - 0.4 * log(sigmoid(ratio))
        assert found["log_odds_ratio"][pair].item() == pytest.approx(ratio, rel=1e-4)
        assert found["nll"][pair].item() == pytest.approx(nll)
        assert found["loss"][pair].item() == pytest.approx(loss, rel=1e-5)
        assert found["accuracy"][pair].item() == float(means[0] > means[1])


def test_orpo_of_answers_that_are_certain_or_impossible():
    policy = torch.tensor([0.0, -4000.0, -2000.0, 0.0], requires_grad=True)
    found = orpo(policy, torch.tensor([5, 5, 5, 5]), 0.1)
    found["loss"].sum().backward()
    assert torch.isfinite(found["loss"]).all()
    assert torch.isfinite(policy.grad).all()


def test_log_probabilities_are_those_of_the_answer_tokens():
    logits = torch.randn(3, 6, 11, dtype=torch.float64)
    labels = torch.tensor(
        [[-100, -100, 4, 5, 6, 2], [7, -100, 1, -100, 2, -100], [-100, -100, -100, 9, 2, -100]]
    )
    sums, counts = answer_log_probabilities(logits, labels)
    assert counts.tolist() == [4, 2, 2]
    for row in range(3):
        # A label at the first place is predicted by nothing.
        expected = sum(
            logits[row, place - 1].log_softmax(-1)[label].item()
            for place, label in enumerate(labels[row].tolist())
            if label != -100 and place
        )
        assert sums[row].item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 200, 50)
    labels = torch.randint(0, 50, (1, 200))
    exact, _ = answer_log_probabilities(logits.to(torch.bfloat16).double(), labels)
    found, _ = answer_log_probabilities(logits.to(torch.bfloat16), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float())

"""Advantages and losses of GRPO against their formulas, written out."""

from math import exp, nan, sqrt

import pytest
import torch

from lightning_peft.tasks.grpo_losses import advantages_of, averaged, grpo

REWARDS = [[1.0, 0.0], [0.0, 2.0], [nan, 1.0], [0.5, nan], [0.5, nan], [nan, nan]]
WEIGHTS = [1.0, 0.5]
TOTALS = [1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    found = advantages_of(torch.tensor(REWARDS), torch.tensor(WEIGHTS), 3, scale)
    mean = 2.5 / 3
    spread = sqrt(sum((one - mean) ** 2 for one in TOTALS[:3]) / 2)
    average = sum(TOTALS) / 5
    of_all = sqrt(sum((one - average) ** 2 for one in TOTALS) / 4)
    divisor = {"group": spread + 1e-4, "batch": of_all + 1e-4, "none": 1.0}[scale]
    expected = [(one - mean) / divisor for one in TOTALS[:3]] + [0.0, 0.0, 0.0]
    assert found.values.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.rewards[:5].tolist() == pytest.approx(TOTALS)
    assert found.rewards[5].isnan()
    if scale != "batch":
        assert found.equal.tolist() == [False, True]


def test_ratios_are_clipped_where_they_gain():
    old = torch.zeros(2, 4)
    policy = torch.tensor([[0.5, -0.5, 0.1, 0.5], [0.5, -0.5, 0.1, 0.5]])
    mask = torch.tensor([[True, True, True, False]] * 2)
    reference = torch.full((2, 4), 0.3)
    gains = torch.tensor([2.0, -3.0])
    loss, kl, clipped = grpo(policy, old, mask, gains, (0.2, 0.3), reference, 0.1)
    for row, gain in enumerate(gains.tolist()):
        for place in range(3):
            ratio, apart = exp(policy[row, place].item()), 0.3 - policy[row, place].item()
            divergence = (exp(apart) - apart - 1) * ratio
            limited = min(max(ratio, 0.8), 1.3)
            expected = -min(ratio * gain, limited * gain) + 0.1 * divergence
            assert loss[row, place].item() == pytest.approx(expected, rel=1e-5)
            assert kl[row, place].item() == pytest.approx(divergence, rel=1e-4)
    assert clipped.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    assert loss[:, 3].tolist() == kl[:, 3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "expected", "items"),
    [
        ("grpo", ((1 + 2) / 2 + 6) / 2, 2),
        ("dapo", 9 / 3, 3),
        ("bnpo", 9 / 3, 1),
        ("dr_grpo", 9 / (2 * 5), 2),
    ],
)
def test_means_over_samples_and_tokens(kind, expected, items):
    loss = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean, count = averaged(loss, mask, kind, 5)
    assert (mean.item(), count) == (pytest.approx(expected), items)


def test_a_batch_without_a_token_teaches_nothing():
    for kind in ("grpo", "dapo", "bnpo", "dr_grpo"):
        mean, _ = averaged(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), kind, 5)
        assert mean.item() == 0

"""Losses of preference tuning, from log-probabilities of answers."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lightning_peft.data.encoding import IGNORED

PairLoss = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "simpo"]
PAIR_LOSSES: tuple[str, ...] = get_args(PairLoss)
# Those that are defined for labels of which a share is wrong.
SMOOTHED = ("sigmoid", "robust", "simpo")

# Largest log-probability per token: the odds of a certain answer are infinite.
_CERTAIN = -torch.finfo(torch.float32).eps


def token_log_probabilities(
    logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each token with a label, in float32, and where they are.

    Args:
        logits: ``(rows, length, vocabulary)``, in any precision.
        labels: ``(rows, length)``; the token itself, or -100 where it is not part of the answer.
        temperature: What logits are divided by.

    Returns:
        In nats, 0 where there is no label, ``(rows, length - 1)``, and where there is one, bool.
    """
    # Position 0 is predicted by nothing, so its label does not count.
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    # Answers alone: in float32 the logits of prompts would take most of the memory.
    answered = logits[:, :-1][labelled].float()
    answered = answered if temperature == 1 else answered / temperature
    by_token = torch.zeros(labelled.shape, device=logits.device)
    by_token[labelled] = -cross_entropy(answered, targets[labelled], reduction="none")
    return by_token, labelled


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each answer, in float32, and its number of tokens.

    Args:
        logits: ``(rows, length, vocabulary)``, in any precision.
        labels: ``(rows, length)``; the token itself, or -100 where it is not part of the answer.

    Returns:
        Sums over the tokens of each row's answer, in nats, ``(rows,)``, and their counts,
        ``(rows,)``.
    """
    by_token, labelled = token_log_probabilities(logits, labels)
    return by_token.sum(1), labelled.sum(1)


def dpo(
    policy: Tensor,
    reference: Tensor,
    tokens: Tensor,
    beta: float,
    loss_type: PairLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Returns the loss of direct preference optimization (arXiv 2305.18290), or a relative's.

    Args:
        policy: Log-probabilities of answers, ``(2 * pairs,)``: chosen ones, then rejected ones.
        reference: The same of the reference.
        tokens: Their numbers of tokens; only ``"ipo"`` reads them.
        beta: How much a log-ratio to the reference counts; more keeps the policy nearer to it.
        loss_type: ``"sigmoid"`` (equation 7), ``"hinge"``, ``"ipo"``, ``"robust"`` or
            ``"apo_zero"``.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round:
            conservative DPO with ``"sigmoid"``, an unbiased loss with ``"robust"``.

    Returns:
        ``loss``, ``accuracy`` (1 where the chosen answer has the greater reward), ``margin``
        between the rewards, ``chosen_reward`` and ``rejected_reward``, each ``(pairs,)``. A reward
        is ``beta`` times the log-ratio of policy and reference.
    """
    ratios = policy - reference
    chosen, rejected = (beta * ratios).chunk(2)
    margin = chosen - rejected
    if loss_type == "hinge":
        loss = torch.relu(1 - margin)
    elif loss_type == "ipo":
        # Per token, as the authors do: the square would grow with the length of the answers.
        better, worse = (ratios / tokens).chunk(2)
        loss = (better - worse - 1 / (2 * beta)) ** 2
    elif loss_type == "apo_zero":
        loss = 1 - chosen.sigmoid() + rejected.sigmoid()
    elif loss_type == "robust":
        right, wrong = (1 - label_smoothing) * logsigmoid(margin), logsigmoid(-margin)
        loss = -(right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    else:
        loss = _smoothed(margin, label_smoothing)
    return _compared(loss, chosen, rejected)


def simpo(
    policy: Tensor, tokens: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Returns the loss of simple preference optimization (arXiv 2405.14734, equation 6).

    Args:
        policy: Log-probabilities of answers, ``(2 * pairs,)``: chosen ones, then rejected ones.
        tokens: Their numbers of tokens.
        beta: Scale of the reward.
        gamma: By how much the chosen answer's reward is to exceed the rejected one's.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round.

    Returns:
        The same as :func:`dpo`. A reward is ``beta`` times the log-probability per token.
    """
    chosen, rejected = (beta * policy / tokens).chunk(2)
    return _compared(_smoothed(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    return -logsigmoid(margin) * (1 - label_smoothing) - logsigmoid(-margin) * label_smoothing


def _compared(loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "loss": loss,
        "accuracy": (chosen > rejected).float(),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def orpo(policy: Tensor, tokens: Tensor, beta: float) -> dict[str, Tensor]:
    """Returns the loss of odds ratio preference optimization (arXiv 2403.07691, equations 3-7).

    The probability of an answer is the geometric mean over its tokens, and both parts of the loss
    use it: the likelihood of the chosen answer, and the ratio of the odds of the two.

    Args:
        policy: Log-probabilities of answers, ``(2 * pairs,)``: chosen ones, then rejected ones.
        tokens: Their numbers of tokens.
        beta: Weight of the odds ratio; the paper's lambda.

    Returns:
        ``loss``, ``accuracy`` (1 where the chosen answer has the greater odds), ``nll`` of the
        chosen answer in nats per token, and ``log_odds_ratio``, each ``(pairs,)``.
    """
    mean = policy / tokens
    likely = mean.clamp(max=_CERTAIN)
    chosen, rejected = (likely - torch.log(-torch.expm1(likely))).chunk(2)
    ratio = chosen - rejected
    nll = -mean.chunk(2)[0]
    return {
        "loss": nll - beta * logsigmoid(ratio),
        "accuracy": (ratio > 0).float(),
        "nll": nll,
        "log_odds_ratio": ratio,
    }


UnpairedLoss = Literal["kto", "apo_zero_unpaired"]
UNPAIRED_LOSSES: tuple[str, ...] = get_args(UnpairedLoss)


def kto(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> dict[str, Tensor]:
    """Returns the loss of Kahneman-Tversky optimization (arXiv 2402.01306, equation 7).

    Args:
        policy: Log-probabilities of answers, ``(rows,)``.
        reference: The same of the reference.
        desirable: Whether an answer is wanted, ``(rows,)``, bool.
        kl: Estimate of the divergence of policy and reference, in nats, a scalar: where the reward
            is zero. With 0 it is the loss ``"apo_zero_unpaired"`` (arXiv 2408.06266).
        beta: How much a log-ratio to the reference counts.
        weights: Of the desirable and of the undesirable rows.

    Returns:
        ``loss``, ``accuracy`` (1 where a desirable answer's log-ratio is above ``kl``, or an
        undesirable one's below) and ``reward`` (``beta`` times the log-ratio), each ``(rows,)``.
    """
    ratios = policy - reference
    gain = torch.where(desirable, ratios - kl, kl - ratios)
    wanted, unwanted = (policy.new_tensor(one) for one in weights)
    weight = torch.where(desirable, wanted, unwanted)
    return {
        "loss": weight * (1 - torch.sigmoid(beta * gain)),
        "accuracy": (gain > 0).float(),
        "reward": beta * ratios,
    }

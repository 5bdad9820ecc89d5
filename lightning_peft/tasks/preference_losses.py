"""The losses of preference tuning, from log-probabilities of answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from lightning_peft.data.encoding import IGNORED

# Largest log-probability per token: the odds of a certain answer are infinite.
_CERTAIN = -torch.finfo(torch.float32).eps


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probability of each answer, in float32, and its number of tokens.

    Args:
        logits: ``(rows, length, vocabulary)``, in any precision.
        labels: ``(rows, length)``; the token itself, or -100 where it is not part of the answer.

    Returns:
        Sums over the tokens of each row's answer, in nats, ``(rows,)``, and their counts,
        ``(rows,)``.
    """
    # Position 0 is predicted by nothing, so its label does not count.
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    # Answers alone: in float32 the logits of prompts would take most of the memory.
    answered = logits[:, :-1][labelled].float()
    by_token = torch.zeros(labelled.shape, device=logits.device)
    by_token[labelled] = -cross_entropy(answered, targets[labelled], reduction="none")
    return by_token.sum(1), labelled.sum(1)


def dpo(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Returns the loss of direct preference optimization (arXiv 2305.18290, equation 7).

    Args:
        policy: Log-probabilities of answers, ``(2 * pairs,)``: chosen ones, then rejected ones.
        reference: The same of the reference.
        beta: How much a log-ratio to the reference counts; more keeps the policy nearer to it.
        label_smoothing: Share of the pairs that are taken to be labelled the wrong way round
            (conservative DPO).

    Returns:
        ``loss``, ``accuracy`` (1 where the chosen answer has the greater reward), ``margin``
        between the rewards, ``chosen_reward`` and ``rejected_reward``, each ``(pairs,)``. A reward
        is ``beta`` times the log-ratio of policy and reference.
    """
    chosen, rejected = (beta * (policy - reference)).chunk(2)
    margin = chosen - rejected
    loss = -logsigmoid(margin) * (1 - label_smoothing) - logsigmoid(-margin) * label_smoothing
    return {
        "loss": loss,
        "accuracy": (margin > 0).float(),
        "margin": margin,
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

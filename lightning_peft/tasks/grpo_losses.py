"""Loss of group relative policy optimization (GRPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

GroupLoss = Literal["dapo", "grpo", "bnpo", "dr_grpo"]
GROUP_LOSSES: tuple[str, ...] = get_args(GroupLoss)
Scaling = Literal["group", "batch", "none"]
SCALINGS: tuple[str, ...] = get_args(Scaling)
# Added to a standard deviation before it divides.
_SMALL = 1e-4


@dataclass(frozen=True)
class Advantages:
    """What the rewards of a batch say of its samples.

    ``values`` are ``(samples,)``, 0 for those without a reward, whose weighted sum in ``rewards``,
    ``(samples,)``, is NaN; ``equal`` groups, ``(groups,)``, have one reward and teach nothing.
    """

    values: Tensor
    rewards: Tensor
    equal: Tensor


def advantages_of(
    rewards: Tensor, weights: Tensor, group_size: int, scale: Scaling = "group"
) -> Advantages:
    """Returns the advantages of samples within their groups (arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: By each function, ``(samples, functions)``, float32; NaN where a function does not
            judge a sample. Samples of a group follow each other.
        weights: Of the functions, ``(functions,)``.
        group_size: Samples in a group.
        scale: What divides the distance to the mean of the group: the standard deviation of the
            ``"group"`` or of the whole ``"batch"``, or ``"none"``.
    """
    total = (rewards * weights).nansum(1)
    total = total.masked_fill(rewards.isnan().all(1), torch.nan)
    groups = total.view(-1, group_size)
    centered = groups - groups.nanmean(1, keepdim=True)
    spread = _deviation(groups)
    if scale == "batch":
        spread = _deviation(total[None]).expand_as(spread)
    scaled = centered if scale == "none" else centered / (spread + _SMALL)
    equal = torch.isclose(spread, torch.zeros_like(spread)).flatten()
    return Advantages(scaled.flatten().nan_to_num(0.0), total, equal)


def _deviation(rows: Tensor) -> Tensor:
    """Returns the sample standard deviation of each row without its NaN, ``(rows, 1)``."""
    known = (~rows.isnan()).sum(1, keepdim=True)
    squares = ((rows - rows.nanmean(1, keepdim=True)) ** 2).nanmean(1, keepdim=True)
    return (squares * known / (known - 1)).sqrt()


def grpo(
    policy: Tensor,
    old: Tensor,
    mask: Tensor,
    advantages: Tensor,
    clip: tuple[float, float],
    reference: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the clipped loss of each token (arXiv 2402.03300, equation 3).

    Args:
        policy: Log-probabilities of the sampled tokens, ``(samples, length)``.
        old: The same of the model that sampled them.
        mask: Which tokens count, ``(samples, length)``, bool.
        advantages: Of each sample, ``(samples,)``.
        clip: How far the ratio of policy and old may fall below 1, and rise above it.
        reference: Log-probabilities of the reference, where ``beta`` is not 0.
        beta: Weight of the divergence from the reference.

    Returns:
        The loss, the divergence from the reference in nats, and whether the ratio was clipped, each
        ``(samples, length)``; 0 where the mask is.
    """
    ratio = torch.exp(policy - old)
    gain = advantages[:, None]
    low, high = 1 - clip[0], 1 + clip[1]
    loss = -torch.min(ratio * gain, ratio.clamp(low, high) * gain)
    clipped = ((ratio < low) & (gain < 0)) | ((ratio > high) & (gain > 0))
    divergence = torch.zeros_like(policy)
    if reference is not None:
        apart = reference - policy
        # Weighted by the ratio, so that its gradient is that of the divergence (arXiv 2512.02556).
        divergence = (torch.exp(apart) - apart - 1) * ratio
        loss = loss + beta * divergence
    return loss * mask, divergence * mask, (clipped & mask).float()


def averaged(loss: Tensor, mask: Tensor, loss_type: GroupLoss, longest: int) -> tuple[Tensor, int]:
    """Returns the loss of a batch, and of how many items it is the mean.

    Args:
        loss: Of each token, ``(samples, length)``.
        mask: Which tokens count, ``(samples, length)``, bool.
        loss_type: ``"grpo"`` is a mean over samples of means over their tokens. ``"dapo"``
            (arXiv 2503.14476) is a mean over the tokens of the whole step, ``"bnpo"`` over those of
            the batch, ``"dr_grpo"`` (arXiv 2503.20783) a sum over tokens, divided by the most that
            all samples might have.
        longest: Most tokens that a sample may have.
    """
    samples, tokens = len(loss), int(mask.sum())
    if loss_type == "grpo":
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).mean(), samples
    if loss_type == "dr_grpo":
        return loss.sum() / (samples * longest), samples
    # Batches of one step have equal weights with "bnpo", and those of their tokens with "dapo".
    return loss.sum() / max(tokens, 1), tokens if loss_type == "dapo" else 1

"""Preference tuning of causal language models: DPO, IPO, SimPO and ORPO."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lightning_peft.tasks.pairwise import PairwiseTask
from lightning_peft.tasks.preference_losses import PAIR_LOSSES, SMOOTHED, PairLoss, dpo, orpo, simpo
from lightning_peft.tasks.reference import ReferencedTask
from lightning_peft.tasks.samples import GeneratedSample, answers

# SimPO's margin by default, as in TRL.
_GAMMA = 0.5


class PreferenceTuning(ReferencedTask, PairwiseTask):
    """A causal language model that learns to prefer chosen answers to rejected ones.

    ``"dpo"`` is direct preference optimization (arXiv 2305.18290). Its reference is the same base
    with the adapters off, so there is no second model, and it needs a strategy or callback that
    adds adapters. ``"orpo"`` is odds ratio preference optimization (arXiv 2403.07691), which
    learns the chosen answers as well and has no reference.

    Logs, as means over pairs, ``val_loss``, ``val_accuracy`` (share of pairs in which the chosen
    answer is preferred), and with DPO ``val_margin``, ``val_chosen_reward`` and
    ``val_rejected_reward``, with ORPO ``val_nll`` and ``val_log_odds_ratio``; the same as
    ``train_...`` and ``test_...``. With DPO and a reference all rewards are 0 before the first
    step, and so is the accuracy.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        loss: ``"dpo"`` or ``"orpo"``.
        beta: With DPO how near the policy is kept to the reference, with ORPO the weight of the
            odds ratio (the paper's lambda); 0.1 is usual for both. With ``"ipo"`` the paper's tau;
            with ``"simpo"`` the scale of the reward, usually 2 to 2.5.
        label_smoothing: With ``"sigmoid"``, ``"robust"`` and ``"simpo"``, share of the pairs that
            are taken to be labelled the wrong way round; below 0.5. ``"robust"`` needs it.
        learning_rate: Peak learning rate of AdamW. The default is that of TRL's example of DPO
            with LoRA, ten times its rate for full fine-tuning; its example of ORPO with LoRA has
            8e-5.
        loss_type: What DPO minimizes, by TRL's names. ``"sigmoid"`` is DPO's own loss; ``"hinge"``
            (arXiv 2305.10425), ``"ipo"`` (arXiv 2310.12036, per token), ``"robust"``
            (arXiv 2403.00409) and ``"apo_zero"`` (arXiv 2408.06266) have the same reference.
            ``"simpo"`` (arXiv 2405.14734) compares log-probabilities per token and has none, so it
            computes none and needs no adapters.
        simpo_gamma: With ``"simpo"``, by how much the chosen answer's reward is to exceed the
            rejected one's.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    positive = (*PairwiseTask.positive, "beta")
    least = {"simpo_gamma": 0}

    def __init__(
        self,
        model: str,
        loss: Literal["dpo", "orpo"] = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        learning_rate: float = 5e-6,
        loss_type: PairLoss = "sigmoid",
        simpo_gamma: float = _GAMMA,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate, **options)

    def _argument_problems(self) -> list[str]:
        hparams = self.hparams
        problems = super()._argument_problems()
        loss, kind, smoothing = (hparams[n] for n in ("loss", "loss_type", "label_smoothing"))
        if loss not in ("dpo", "orpo"):
            problems.append(f"loss={loss!r} is neither 'dpo' nor 'orpo'")
        if kind not in PAIR_LOSSES:
            problems.append(f"loss_type={kind!r} is none of {', '.join(map(repr, PAIR_LOSSES))}")
        elif kind != "sigmoid" and loss != "dpo":
            problems.append(f"loss_type={kind!r} is for loss='dpo' alone; leave it out")
        if not 0 <= smoothing < 0.5:
            problems.append(f"label_smoothing={smoothing} is not in [0, 0.5)")
        elif smoothing and loss != "dpo":
            problems.append("label_smoothing is for loss='dpo' alone; leave it out")
        elif smoothing and kind in PAIR_LOSSES and kind not in SMOOTHED:
            problems.append(f"loss_type={kind!r} has no label_smoothing; leave it out")
        elif kind == "robust" and not smoothing:
            problems.append(
                "loss_type='robust' without label_smoothing is 'sigmoid'; give the share of pairs "
                "that are labelled the wrong way round, such as label_smoothing=0.1"
            )
        if hparams["simpo_gamma"] != _GAMMA and kind != "simpo":
            problems.append("simpo_gamma is for loss_type='simpo' alone; leave it out")
        return problems

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs a reference."""
        return self.hparams["loss"] == "dpo" and self.hparams["loss_type"] != "simpo"

    @property
    def title(self) -> str:
        """The class and its loss, for messages."""
        return f"{type(self).__name__}(loss={self.hparams['loss']!r})"

    def compared(self) -> tuple[str, ...]:
        """Returns the names of what is measured with this loss."""
        if self.hparams["loss"] == "orpo":
            return ("loss", "accuracy", "nll", "log_odds_ratio")
        return ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")

    def compare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the loss and what else is measured of each pair of ``batch``."""
        hparams = self.hparams
        if hparams["loss"] == "orpo":
            return orpo(*self.answers(batch), hparams["beta"])
        if not self.has_reference:
            settings = (hparams[name] for name in ("beta", "simpo_gamma", "label_smoothing"))
            return simpo(*self.answers(batch), *settings)
        # Before the policy: no graph may hold weights that are exchanged for the reference.
        expected = self.reference_answers(batch)
        settings = (hparams[name] for name in ("beta", "loss_type", "label_smoothing"))
        policy, tokens = self.answers(batch)
        return dpo(policy, expected, tokens, *settings)

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's answers to the prompts of ``rows``, and the chosen answers."""
        chosen = [(row["chosen_input_ids"], row["chosen_labels"]) for row in rows]
        return answers(self, chosen, max_new_tokens)

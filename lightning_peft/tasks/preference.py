"""Preference tuning of causal language models: DPO and ORPO."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft import engine
from lightning_peft.tasks.pairwise import PairwiseTask
from lightning_peft.tasks.preference_losses import answer_log_probabilities, dpo, orpo
from lightning_peft.tasks.reference import check_reference, reference
from lightning_peft.tasks.samples import GeneratedSample, answers

log = logging.getLogger(__name__)

# Nats per answer, far above rounding.
_NOTICEABLE = 0.01


class PreferenceTuning(PairwiseTask):
    """A causal language model that learns to prefer chosen answers to rejected ones.

    ``"dpo"`` is direct preference optimization (arXiv 2305.18290). Its reference is the same base
    with the adapters off, so there is no second model, and it needs a strategy or callback that
    adds adapters. ``"orpo"`` is odds ratio preference optimization (arXiv 2403.07691), which
    learns the chosen answers as well and has no reference.

    Logs, as means over pairs, ``val_loss``, ``val_accuracy`` (share of pairs in which the chosen
    answer is preferred), and with DPO ``val_margin``, ``val_chosen_reward`` and
    ``val_rejected_reward``, with ORPO ``val_nll`` and ``val_log_odds_ratio``; the same as
    ``train_...`` and ``test_...``. With DPO all rewards are 0 before the first step, and so is the
    accuracy.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        loss: ``"dpo"`` or ``"orpo"``.
        beta: With DPO how near the policy is kept to the reference, with ORPO the weight of the
            odds ratio (the paper's lambda); 0.1 is usual for both.
        label_smoothing: With DPO, share of the pairs that are taken to be labelled the wrong way
            round; below 0.5.
        learning_rate: Peak learning rate of AdamW. The default is that of TRL's example of DPO
            with LoRA, ten times its rate for full fine-tuning; its example of ORPO with LoRA has
            8e-5.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        model: str,
        loss: Literal["dpo", "orpo"] = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        learning_rate: float = 5e-6,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate, **options)
        self._start_checked = False

    def _argument_problems(self) -> list[str]:
        hparams = self.hparams
        problems = super()._argument_problems()
        if hparams["loss"] not in ("dpo", "orpo"):
            problems.append(f"loss={hparams['loss']!r} is neither 'dpo' nor 'orpo'")
        if hparams["beta"] <= 0:
            problems.append(f"beta={hparams['beta']} is not above 0")
        if not 0 <= hparams["label_smoothing"] < 0.5:
            problems.append(f"label_smoothing={hparams['label_smoothing']} is not in [0, 0.5)")
        elif hparams["label_smoothing"] and hparams["loss"] != "dpo":
            problems.append("label_smoothing is for loss='dpo' alone; leave it out")
        return problems

    def compared(self) -> tuple[str, ...]:
        """Returns the names of what is measured with this loss."""
        if self.hparams["loss"] == "orpo":
            return ("loss", "accuracy", "nll", "log_odds_ratio")
        return ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")

    def compare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the loss and what else is measured of each pair of ``batch``."""
        hparams = self.hparams
        if hparams["loss"] == "orpo":
            return orpo(*self._answers(batch), hparams["beta"])
        # Before the policy: no graph may hold weights that are exchanged for the reference.
        expected = self._reference(batch)
        policy, _ = self._answers(batch)
        return dpo(policy, expected, hparams["beta"], hparams["label_smoothing"])

    def _answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return answer_log_probabilities(output.logits, batch["labels"])

    def _reference(self, batch: dict[str, Tensor]) -> Tensor:
        with reference(self):
            return self._answers(batch)[0]

    def on_fit_start(self) -> None:
        """Checks that there is a reference, and puts the model in train mode.

        Raises:
            ConfigError: If the loss needs a reference and the base is none.
        """
        self._check_reference()
        super().on_fit_start()

    def _check_reference(self) -> None:
        if self.hparams["loss"] == "dpo":
            check_reference(self)

    on_validation_start = on_test_start = on_predict_start = _check_reference

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Says so once if training does not begin at the reference, on its first batch."""
        known, self._start_checked = self._start_checked, True
        if known or self.hparams["loss"] != "dpo" or self.trainer.global_step:
            return
        assert self.model is not None
        plugin: Any = self.trainer.precision_plugin
        with torch.no_grad(), engine.in_eval_mode(self.model), plugin.forward_context():
            apart = (self._answers(batch)[0] - self._reference(batch)).abs().mean()
        if apart > _NOTICEABLE:
            log.warning(
                "The adapters have learnt something already: answers are %.2f nats from the "
                "reference before the first step, which is the base without them. If they are to "
                "be the reference, merge them into the base first.",
                apart,
            )

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's answers to the prompts of ``rows``, and the chosen answers."""
        chosen = [(row["chosen_input_ids"], row["chosen_labels"]) for row in rows]
        return answers(self, chosen, max_new_tokens)

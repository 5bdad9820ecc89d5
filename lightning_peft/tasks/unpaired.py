"""Kahneman-Tversky optimization (KTO)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_peft import engine
from lightning_peft.compat.lightning import trainer_of
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.unpaired import UnpairedPreferenceData, label_counts
from lightning_peft.errors import ConfigError
from lightning_peft.tasks.preference_losses import UNPAIRED_LOSSES, UnpairedLoss, kto
from lightning_peft.tasks.reference import ReferencedTask
from lightning_peft.tasks.samples import GeneratedSample, answers

log = logging.getLogger(__name__)

_INPUTS = ("input_ids", "attention_mask", "labels")

# Ratio of the weighted counts of desirable and undesirable rows, by equation 8 of the paper.
_BALANCED = (1.0, 1.33)


class UnpairedPreferenceTuning(ReferencedTask):
    """A causal language model that learns which answers are wanted, from one answer at a time.

    ``"kto"`` is Kahneman-Tversky optimization (arXiv 2402.01306). A reward is ``beta`` times the
    log-ratio of the model and its reference, which is the same base with the adapters off; its zero
    is the divergence of the two, estimated in each batch from prompts with answers to others.
    ``"apo_zero_unpaired"`` (arXiv 2408.06266) sets that zero to 0 and computes no estimate.

    Logs, as means over rows, ``val_loss``, ``val_accuracy`` (share of rows whose reward is on the
    right side of zero), ``val_kl``, and over the rows of one label ``val_desirable_reward`` and
    ``val_undesirable_reward``, with ``val_margin`` between the two; the first three also as
    ``train_...``, all as ``test_...``. With ``"kto"`` they depend on which rows share a batch.
    Before the first step all but the loss are 0.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        loss_type: ``"kto"`` or ``"apo_zero_unpaired"``.
        beta: How near the policy is kept to the reference; 0.1 is usual.
        desirable_weight: Weight of the loss of desirable rows.
        undesirable_weight: Weight of the loss of undesirable rows. Where the labels are not
            balanced, a warning gives the range that the paper recommends for one of the two.
        learning_rate: Peak learning rate of AdamW. The default is ten times that of TRL's example
            of KTO with LoRA, as with DPO.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    couples_rows = True
    positive = (*ReferencedTask.positive, "beta", "desirable_weight", "undesirable_weight")

    def __init__(
        self,
        model: str,
        loss_type: UnpairedLoss = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        learning_rate: float = 5e-6,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate, **options)

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        kind = self.hparams["loss_type"]
        if kind not in UNPAIRED_LOSSES:
            known = " nor ".join(map(repr, UNPAIRED_LOSSES))
            problems.append(f"loss_type={kind!r} is neither {known}")
        return problems

    @property
    def title(self) -> str:
        """The class and its loss, for messages."""
        return f"{type(self).__name__}(loss_type={self.hparams['loss_type']!r})"

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over rows, and over the rows of one label."""
        names = ("loss", "accuracy", "kl", "desirable_reward", "undesirable_reward")
        return {name: MeanMetric() for name in names}

    def on_fit_start(self) -> None:
        """Checks batches, labels and reference, and puts the model in train mode."""
        super().on_fit_start()
        data = self._datamodule
        if not isinstance(data, UnpairedPreferenceData):
            return
        if self.hparams["loss_type"] == "kto" and data.batch_size < 2:
            raise ConfigError(
                f"batch_size={data.batch_size} leaves no other answer in a batch to estimate the "
                f"divergence from, which {self.title} needs. Take 2 or more (8 in the recipe), or "
                "loss_type='apo_zero_unpaired', which needs no estimate."
            )
        advice = self.balance_advice(*label_counts(data.read().summary))
        if advice and self.trainer.is_global_zero:
            log.warning(advice)

    def balance_advice(self, desirable: int, undesirable: int) -> str | None:
        """Returns how to weight rows outside of 1:1 to 1.33:1 (the paper's equation 8)."""
        weights = (self.hparams["desirable_weight"], self.hparams["undesirable_weight"])
        ratio = weights[0] * desirable / (weights[1] * undesirable)
        low, high = _BALANCED
        # As TRL, which compares rounded numbers: equal counts need no weights.
        if desirable == undesirable or low - 0.005 <= ratio <= high + 0.005:
            return None
        of_desirable = [bound * weights[0] / ratio for bound in (low, high)]
        of_undesirable = [ratio * weights[1] / bound for bound in (high, low)]
        return (
            f"{desirable:,} training rows are desirable and {undesirable:,} are not, and with "
            f"desirable_weight={weights[0]:g} and undesirable_weight={weights[1]:g} one side "
            "outweighs the other. Set either desirable_weight to "
            f"{of_desirable[0]:.2f} to {of_desirable[1]:.2f}, or undesirable_weight to "
            f"{of_undesirable[0]:.2f} to {of_undesirable[1]:.2f}, not both."
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the rows of ``batch``."""
        measured = self.measure(batch)
        rows = len(measured["loss"])
        means = {name: measured[name].mean() for name in ("loss", "accuracy", "kl")}
        self.log_training(batch_idx, means, means["loss"].new_tensor(rows), rows)
        return means["loss"]

    def measure(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns ``loss``, ``accuracy``, ``reward`` and ``kl`` of each row, ``(rows,)``."""
        hparams = self.hparams
        estimated = hparams["loss_type"] == "kto"
        mismatched = {name: batch[f"kl_{name}"] for name in _INPUTS} if estimated else None
        # Before the policy: no graph may hold weights that are exchanged for the reference.
        expected = self.reference_answers(batch)
        before = self.reference_answers(mismatched) if mismatched else None
        policy, _ = self.answers(batch)
        kl = policy.new_zeros(())
        if mismatched and before is not None:
            kl = self._divergence(mismatched, before)
        weights = (hparams["desirable_weight"], hparams["undesirable_weight"])
        found = kto(policy, expected, batch["desirable"], kl, hparams["beta"], weights)
        return {**found, "kl": kl.expand(len(policy))}

    def _divergence(self, mismatched: dict[str, Tensor], reference: Tensor) -> Tensor:
        """Returns the estimate of all processes that train together; 0 or more."""
        assert self.model is not None
        # After the policy: under autocast, casts that this pass kept would have no gradient.
        with torch.no_grad(), engine.in_eval_mode(self.model):
            ratios = self.answers(mismatched)[0] - reference
            there = (mismatched["labels"] != IGNORED).any(1)
            kl = (ratios * there).sum() / there.sum().clamp(min=1)
        trainer: Any = trainer_of(self)
        if trainer is not None and trainer.training:
            kl = trainer.strategy.reduce(kl, None, "mean")
        return kl.clamp(min=0)

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the rows of ``batch``."""
        measured = self.measure(batch)
        for name in ("loss", "accuracy", "kl"):
            self.metrics[name].update(measured[name])
        for name, chosen in (
            ("desirable", batch["desirable"]),
            ("undesirable", ~batch["desirable"]),
        ):
            self.metrics[f"{name}_reward"].update(measured["reward"], chosen.float())

    def results(self) -> dict[str, Any]:
        """Returns the means; of labels that no row has, none."""
        rewards = [f"{name}_reward" for name in ("desirable", "undesirable")]
        absent = {name for name in rewards if not self.metrics[name].weight}
        found = {name: value for name, value in super().results().items() if name not in absent}
        if all(name in found for name in rewards):
            found["margin"] = found[rewards[0]] - found[rewards[1]]
        return found

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns reward, loss and label of each row, by name."""
        measured = self.measure(batch)
        columns = {"desirable": batch["desirable"], **measured}
        values = zip(*(tensor.tolist() for tensor in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's answers to the prompts of ``rows``, and the rows' own answers."""
        given = [(row["input_ids"], row["labels"]) for row in rows]
        marks = ["" if row["desirable"] else "[undesirable] " for row in rows]
        return [
            replace(sample, expected=f"{mark}{sample.expected}")
            for sample, mark in zip(answers(self, given, max_new_tokens), marks, strict=True)
        ]

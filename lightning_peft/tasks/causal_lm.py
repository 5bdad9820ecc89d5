"""Supervised fine-tuning of causal language models."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lightning_peft.data.encoding import IGNORED
from lightning_peft.tasks.pretrained import PretrainedTask
from lightning_peft.tasks.samples import GeneratedSample, answers
from lightning_peft.tasks.token_loss import TokenLoss, label_places

# Longest text that predict_step generates.
MAX_NEW_TOKENS = 256


class CausalLM(PretrainedTask):
    """A causal language model trained on the tokens that carry a label.

    Logs ``val_loss`` (nats per labelled token), ``val_perplexity`` (its exponential) and
    ``val_token_accuracy`` (share of labelled tokens that are the most likely one), and the same
    as ``test_...``.

    Logits exist only where there is a label, a few at a time, if a trial on the first batch shows
    that the model's own loss is the same; else the model computes its loss.

    The arguments are those of :class:`PretrainedTask
    <lightning_peft.tasks.pretrained.PretrainedTask>`.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    @cached_property
    def token_loss(self) -> TokenLoss:
        """Computes the loss without the logits of tokens that have no label, where it can."""
        return TokenLoss()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch; where its labels are, the CPU finds: a GPU would have to be waited for."""
        transfer = super().transfer_batch_to_device
        places = None if device.type == "cpu" else label_places(batch)
        moved = transfer(batch, device, dataloader_idx)
        if places is not None:
            self.token_loss.keep_places(moved["labels"], transfer(places, device, dataloader_idx))
        return moved

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over labelled tokens."""
        return {"loss": MeanMetric(), "token_accuracy": MeanMetric()}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the labelled tokens of ``batch``."""
        assert self.model is not None
        loss = self.token_loss.train(self, self.model, batch)
        labels = batch["labels"]
        tokens = (labels[:, 1:] != IGNORED).sum()
        self.log_training(batch_idx, {"loss": loss}, tokens, len(labels))
        return loss

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """Adds the labelled tokens of ``batch``."""
        assert self.model is not None
        scored = self.token_loss.evaluate(self, self.model, batch)
        if scored.tokens:
            self.metrics["loss"].update(scored.loss, scored.tokens)
            self.metrics["token_accuracy"].update(scored.correct / scored.tokens, scored.tokens)

    def results(self) -> dict[str, Any]:
        """Returns loss, perplexity and token accuracy."""
        metrics = super().results()
        return {**metrics, "perplexity": torch.exp(metrics["loss"])}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, str]]:
        """Returns prompt, expected and generated text of each row."""
        rows = [
            {"input_ids": ids[columns].tolist(), "labels": labels[columns].tolist()}
            for ids, labels, columns in zip(
                batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
            )
        ]
        return [asdict(sample) for sample in self.generate_samples(rows, MAX_NEW_TOKENS)]

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's answers to the prompts of ``rows`` of the data module."""
        return answers(self, [(row["input_ids"], row["labels"]) for row in rows], max_new_tokens)

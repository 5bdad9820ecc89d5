"""Supervised fine-tuning of causal language models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Base
    from transformers import PreTrainedModel
else:
    _Base = object


class CausalLM(_Base, metaclass=PerNamespace):
    """A causal language model trained on the tokens that carry a label.

    The model is loaded in ``configure_model``, so that nothing is in memory before the Trainer
    runs. It knows nothing of adapters: those come with the strategy.

    Args:
        model: Name on the hub, or folder, of a transformers causal language model.
        learning_rate: Peak learning rate of AdamW, reached after the warm-up; 2e-4 is usual for
            adapters of large models.
        weight_decay: Decoupled weight decay.
        warmup: Share of the steps in which the rate rises linearly; it then falls as a cosine.
        dtype: Dtype that the weights are loaded in, such as ``"float32"``; ``"auto"`` takes that
            of the file.
        revision: Branch, tag or commit on the hub.
    """

    lightning_base = "core.module.LightningModule"

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.001,
        warmup: float = 0.03,
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Loads the model, once."""
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(
                self.hparams["model"],
                dtype=self.hparams["dtype"],
                revision=self.hparams["revision"],
            )

    def on_fit_start(self) -> None:
        """Puts the model in train mode: ``from_pretrained`` returns it in eval mode."""
        assert self.model is not None
        self.model.train()

    def forward(self, **batch: Tensor) -> Any:
        """Returns the model's output; ``logits`` are ``(batch, length, vocabulary)``."""
        assert self.model is not None
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean loss over the labelled tokens of ``batch``."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Logs the mean loss over the labelled tokens of all batches."""
        # Position 0 is predicted by nothing, so its label does not count.
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        self.log("val_loss", self(**batch).loss, batch_size=labelled, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Returns AdamW over what requires gradients, with warm-up and cosine decay per step."""
        optimizer = torch.optim.AdamW(
            [param for param in self.parameters() if param.requires_grad],
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = max(1, round(self.hparams["warmup"] * steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (
                1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))
            )

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

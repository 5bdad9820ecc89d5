"""A protein language model."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from transformers import EsmConfig, EsmForMaskedLM

from lightning_peft import LoRAStrategy, load_from_checkpoint


class Proteins(pl.LightningModule):
    """Guesses hidden amino acids."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        self.model = EsmForMaskedLM(
            EsmConfig(vocab_size=16, num_attention_heads=2, mask_token_id=3, pad_token_id=0,
                      position_embedding_type="rotary", **size)
        )  # fmt: skip

    def training_step(self, batch, index):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(input_ids=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    lora = LoRAStrategy(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=20, strategy=lora)
    trainer.fit(Proteins(), loader("protein"))
    trainer.save_checkpoint(folder / "last.ckpt")
    pl.seed_everything(0)
    module = load_from_checkpoint(Proteins, folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("protein", 1))
    return metrics["val_loss"]

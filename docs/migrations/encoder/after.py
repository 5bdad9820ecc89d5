"""A classifier of cells with torch's own encoder."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from torch import nn

from lightning_peft import LoRAStrategy, load_from_checkpoint


class Cells(pl.LightningModule):
    """Says of which type a cell is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 2)

    def step(self, batch):
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0]).mean(1)), batch[1])

    def training_step(self, batch, index):
        return self.step(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    lora = LoRAStrategy(r=4, lora_alpha=8, target_modules=["out_proj", "linear1", "linear2"])
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=5, strategy=lora)
    trainer.fit(Cells(), loader("encoder"))
    trainer.save_checkpoint(folder / "last.ckpt")
    pl.seed_everything(0)
    module = load_from_checkpoint(Cells, folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("encoder", 1))
    return metrics["val_loss"]

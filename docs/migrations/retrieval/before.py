"""A bi-encoder that sets its aliases back after PEFT exchanged the layers."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel


class Retrieval(pl.LightningModule):
    """Finds the document that a query means."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = BertModel(BertConfig(vocab_size=40, num_attention_heads=2, **size, **rates))
        self.layers = self.model.encoder.layer
        self.projection = nn.Linear(32, 16)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
        self.model = get_peft_model(self.model, config)
        self.layers = self.model.base_model.model.encoder.layer

    def embed(self, tokens):
        states = self.model.base_model.model.embeddings(tokens)
        for layer in self.layers:
            states = layer(states)
            states = states[0] if isinstance(states, tuple) else states
        return nn.functional.normalize(self.projection(states.mean(1)), dim=-1)

    def step(self, batch):
        query, document = (self.embed(tokens) for tokens in batch)
        scores = 8 * query @ document.T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    def training_step(self, batch, index):
        return self.step(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=10)
    trainer.fit(Retrieval(), loader("retrieval"))
    trainer.save_checkpoint(folder / "last.ckpt")
    module = Retrieval.load_from_checkpoint(folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("retrieval", 1))
    return metrics["val_loss"]

"""Molecules and a language model: graph encoder, Q-Former, LoRA."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRAStrategy, load_from_checkpoint


class QFormer(nn.Module):
    """Queries that read what an encoder made."""

    def __init__(self, width: int = 16, out: int = 32) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, width) / 4)
        self.reader = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, out)

    def forward(self, seen):
        queries = self.queries.expand(len(seen), -1, -1)
        return self.out(queries + self.reader(queries, seen, seen)[0])


class Molecules(pl.LightningModule):
    """Writes a text about a molecule."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(6), nn.ReLU())
        self.qformer = QFormer()
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        self.llm = LlamaForCausalLM(
            LlamaConfig(vocab_size=16, num_attention_heads=2, num_key_value_heads=2, **size)
        )
        for parameter in self.encoder[0].parameters():
            parameter.requires_grad = False

    def step(self, batch):
        atoms, text = batch
        seen = self.qformer(self.encoder(atoms))
        words = self.llm.get_input_embeddings()(text)
        labels = torch.cat([torch.full(seen.shape[:2], -100), text], 1)
        return self.llm(inputs_embeds=torch.cat([seen, words], 1), labels=labels).loss

    def training_step(self, batch, index):
        return self.step(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    lora = LoRAStrategy(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=20, strategy=lora)
    trainer.fit(Molecules(), loader("multimodal"))
    trainer.save_checkpoint(folder / "last.ckpt")
    pl.seed_everything(0)
    module = load_from_checkpoint(Molecules, folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("multimodal", 1))
    return metrics["val_loss"]

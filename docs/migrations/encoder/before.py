"""A classifier of cells, whose encoder layer was written again so that PEFT's adapters train."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from peft import LoraConfig, get_peft_model
from torch import nn


class TransformerEncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` with attention of plain linear layers."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention = original.self_attn
        width, self.heads = attention.embed_dim, attention.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for layer, weight, bias in zip(projections, weights, biases, strict=True):
            layer.weight.data, layer.bias.data = weight.data.clone(), bias.data.clone()
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(attention.out_proj.state_dict())
        self.linear1, self.linear2 = original.linear1, original.linear2
        self.norm1, self.norm2 = original.norm1, original.norm2

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = (
            layer(x).view(rows, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out_proj(seen.transpose(1, 2).reshape(rows, length, width)))
        return self.norm2(x + self.linear2(torch.relu(self.linear1(x))))


class Cells(pl.LightningModule):
    """Says of which type a cell is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        layers = nn.TransformerEncoder(layer, 2).layers
        self.head = nn.Linear(16, 2)
        self.encoder = nn.Sequential(*(TransformerEncoderLayer(one) for one in layers))
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["out_proj", "linear1", "linear2"])
        self.encoder = get_peft_model(self.encoder, config)

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
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=5)
    trainer.fit(Cells(), loader("encoder"))
    trainer.save_checkpoint(folder / "last.ckpt")
    module = Cells.load_from_checkpoint(folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("encoder", 1))
    return metrics["val_loss"]

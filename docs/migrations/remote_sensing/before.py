"""A classifier of satellite images, whose fused qkv is taken apart for PEFT."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from made_data import loader
from peft import LoraConfig, get_peft_model
from torch import nn


class Attention(nn.Module):
    """Self-attention with a fused qkv, as in timm."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(seen.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Attention and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.fc1 = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer of four bands."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 4, 4)
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x):
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


class SplitQkv(nn.Module):
    """The fused layer as three, of which PEFT adapts two."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        width = attention.qkv.in_features
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        for index, layer in enumerate((self.query, self.key, self.value)):
            place = slice(index * width, (index + 1) * width)
            layer.weight.data = attention.qkv.weight.data[place].clone()
            layer.bias.data = attention.qkv.bias.data[place].clone()

    def forward(self, x):
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


def split(model):
    """Exchanges every fused layer; the names in checkpoints of the base are then others."""
    for block in model.blocks:
        block.attn.qkv = SplitQkv(block.attn)
    return model


class Scenes(pl.LightningModule):
    """Says what a scene shows."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ViT()
        self.head = nn.Linear(16, 2)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "fc1", "fc2"])
        self.backbone = get_peft_model(split(self.backbone), config)

    def step(self, batch):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def training_step(self, batch, index):
        return self.step(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self):
        trained = [p for n, p in self.named_parameters() if "lora" in n or n.startswith("head")]
        return torch.optim.AdamW(trained, lr=1e-2)


def main(folder: Path) -> float:
    """Trains, loads the file into a new module, and returns the validation loss."""
    pl.seed_everything(0)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=5)
    trainer.fit(Scenes(), loader("remote_sensing"))
    trainer.save_checkpoint(folder / "last.ckpt")
    module = Scenes.load_from_checkpoint(folder / "last.ckpt")
    (metrics,) = trainer.validate(module, loader("remote_sensing", 1))
    return metrics["val_loss"]

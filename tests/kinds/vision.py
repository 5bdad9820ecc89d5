"""LightningModules around images."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from .kind import Kind, names


def images(count: int = 4, size: int = 16, classes: int = 10) -> list[tuple[torch.Tensor, ...]]:
    found = [torch.randn(4, 3, size, size) for _ in range(count)]
    return [(x, (x.mean((1, 2, 3)) * 1e4).long() % classes) for x in found]


class Classifier(pl.LightningModule):
    """Any net that maps images to ten classes."""

    def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"},
        }


class ViT(Classifier):
    def __init__(self) -> None:
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            num_labels=10,
        )
        super().__init__(ViTForImageClassification(config).eval())

    def forward(self, x):
        return self.net(x).logits


class FusedAttention(nn.Module):
    """One layer for query, key and value whose weight is read, as in timm's BEiT and EVA."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(input=x, weight=self.qkv.weight, bias=bias)
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x):
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FusedViT(nn.Module):
    def __init__(self, width: int = 96, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    """A residual block; ``conv1.stride`` is read from outside, as torchvision's code does."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        assert self.conv1.stride == self.downsample.stride
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2))
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class DepthwiseNet(nn.Module):
    """ConvNeXt-like: depthwise kernels, pointwise linear layers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class UNet(L.LightningModule):
    """Segmentation with no linear layer at all; made in ``configure_model``."""

    def configure_model(self):
        if hasattr(self, "down"):
            return
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.middle = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(F.relu(self.middle(skip)))], 1))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        return F.cross_entropy(self(x), (x.mean(1) > 0).long())

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Tiny(nn.Module):
    """Sizes that are not multiples of anything: 96 channels, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(768, 96), nn.Linear(96, 10)
        self.fc3 = nn.Linear(10, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(self.flatten(x))))))


class MomentumContrast(pl.LightningModule):
    """Self-supervised learning with a teacher that follows the student, as in MoCo and BYOL."""

    def __init__(self, freeze: bool = True, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.backbone = nn.Sequential(
            nn.Flatten(), nn.Linear(768, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64)
        )
        self.projection = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_momentum = copy.deepcopy(self.projection)
        self.prediction_head = nn.Linear(32, 32)
        for other in (self.backbone_momentum, self.projection_momentum):
            for param in other.parameters():
                param.requires_grad = not freeze

    @torch.no_grad()
    def update(self, model, other):
        for follower, leader in zip(other.parameters(), model.parameters(), strict=True):
            follower.data = follower.data * self.momentum + leader.data * (1.0 - self.momentum)

    def contrast(self, x):
        student = self.prediction_head(self.projection(self.backbone(x)))
        with torch.no_grad():
            teacher = self.projection_momentum(self.backbone_momentum(x.flip(-1)))
        return -F.cosine_similarity(student, teacher.detach()).mean()

    def training_step(self, batch, batch_idx):
        self.update(self.backbone, self.backbone_momentum)
        self.update(self.projection, self.projection_momentum)
        return self.contrast(batch[0])

    def validation_step(self, batch, batch_idx):
        return self.contrast(batch[0])

    def configure_optimizers(self):
        params = [*self.backbone.parameters(), *self.projection.parameters()]
        params += list(self.prediction_head.parameters())
        return torch.optim.SGD(params, lr=0.05)


KINDS = [
    Kind(
        "vit",
        "Vision",
        "transformers vision transformer with a fresh head",
        ViT,
        images,
        adapted=names("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        note="the head trains in full",
    ),
    Kind(
        "fused qkv",
        "Vision",
        "vision transformer that reads a fused `qkv.weight` (timm's BEiT, EVA)",
        lambda: Classifier(FusedViT()),
        images,
        adapted=names("qkv", "proj", "fc1", "fc2"),
        note="code that reads the weight gets `W + s B A`; dropout in front of the adapter does "
        "not apply there",
    ),
    Kind(
        "cnn",
        "Vision",
        "CNN with batch norm (ResNet)",
        lambda: Classifier(ResNet()),
        images,
        adapted=names("stem", "conv1", "conv2", "downsample"),
        note="without linear layers besides the head, the convolutions are adapted and quantized; "
        "running statistics are in every checkpoint",
    ),
    Kind(
        "depthwise",
        "Vision",
        "CNN with depthwise convolutions (ConvNeXt)",
        lambda: Classifier(DepthwiseNet()),
        images,
        adapted=names("pwconv1", "pwconv2"),
        note="the linear layers are adapted; a grouped convolution is adapted where "
        "`target_modules` names it and its groups divide the rank, and cannot be merged",
    ),
    Kind(
        "u-net",
        "Vision",
        "segmentation net of convolutions and transposed convolutions only",
        UNet,
        images,
        adapted=names("0", "middle", "up"),
        note="the last convolution is the head; PEFT itself has no transposed convolutions, so "
        "only this package loads such an adapter folder",
    ),
    Kind(
        "tiny",
        "Vision",
        "layers of odd sizes (96 channels, 10 classes)",
        lambda: Classifier(Tiny()),
        images,
        adapted=names("fc1", "fc2"),
    ),
    Kind(
        "momentum teacher",
        "Vision",
        "self-supervised learning with a momentum teacher (MoCo, DINO)",
        MomentumContrast,
        images,
        adapted=names("0", "1", "4", "2"),
        note="the frozen copy follows in its adapters; its base stays what it was",
    ),
    Kind(
        "momentum teacher unfrozen",
        "Vision",
        "the same with a teacher that is only shielded by `no_grad` (BYOL)",
        lambda: MomentumContrast(freeze=False),
        images,
        adapted=names("0", "1", "4", "2"),
    ),
]

"""LightningModules that do something unusual with optimizers, parts or models made elsewhere."""

from __future__ import annotations

import lightning.pytorch as L
import peft
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from .kind import Kind, names
from .language import LanguageModel, bert, labelled, llama, text


class GAN(pl.LightningModule):
    """Manual optimization with two optimizers over explicit lists."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32))
        self.discriminator = nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def adversarial(self, x, real):
        target = torch.full((len(x), 1), float(real), device=x.device)
        return F.binary_cross_entropy_with_logits(self.discriminator(x), target)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        noise = torch.randn(len(batch), 16, device=batch.device)
        self.toggle_optimizer(first)
        loss = self.adversarial(self.generator(noise), True)
        self.log("g_loss", loss, prog_bar=True)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        fake = self.generator(noise).detach()
        loss = self.adversarial(batch, True) + self.adversarial(fake, False)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def validation_step(self, batch, batch_idx):
        loss = self.adversarial(self.generator(batch[:, :16]), True)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-2, betas=(0.5, 0.999)),
        )


class TwoTowers(L.LightningModule):
    """Two encoders, of which one is adapted; the other keeps training as it did."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.image = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def on_fit_start(self):
        L.seed_everything(3)

    def training_step(self, batch, batch_idx):
        a, b = F.normalize(self.text(batch)), F.normalize(self.image(batch.flip(1)))
        logits = a @ b.t() * self.temperature.exp()
        return F.cross_entropy(logits, torch.arange(len(batch), device=batch.device))

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Gate(nn.Module):
    """A gated linear unit; its layer has a name that heads have elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 64)

    def forward(self, x):
        return F.glu(self.fc(x))


class GatedForecaster(L.LightningModule):
    """Gates under names of their own, as in a temporal fusion transformer, and one head."""

    def __init__(self) -> None:
        super().__init__()
        self.after_encoder, self.after_attention, self.before_output = Gate(), Gate(), Gate()
        self.output_layer = nn.Linear(32, 1)

    def training_step(self, batch, batch_idx):
        x = batch + self.after_encoder(batch)
        x = x + self.after_attention(x)
        return F.mse_loss(self.output_layer(x + self.before_output(x)), batch[:, :1])

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def quantized_llama() -> nn.Module:
    """What ``from_pretrained(quantization_config=...)`` returns: bitsandbytes' own layers."""
    import tempfile

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as folder:
        llama(tied=False).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def wrapped_llama() -> nn.Module:
    """What ``get_peft_model`` returns."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    return peft.get_peft_model(llama(tied=False), config)


def noise() -> list[torch.Tensor]:
    return [torch.randn(8, 32) for _ in range(4)]


LINEAR = names("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

KINDS = [
    Kind(
        "gan",
        "Classic",
        "GAN: manual optimization, two optimizers",
        GAN,
        noise,
        adapted=names("0", "2"),
        note="the last layer of the module, here the discriminator's, counts as its head",
    ),
    Kind(
        "two towers",
        "Classic",
        "several submodules, one of them adapted",
        TwoTowers,
        noise,
        strategy={"adapt": "text"},
        adapted=names("0"),
        note="name it in `adapt`; everything outside of it trains as it did",
    ),
    Kind(
        "gates",
        "Classic",
        "blocks of one class under names of their own, and a head",
        GatedForecaster,
        noise,
        adapted=names("fc"),
        note="`fc` of a block that occurs three times or more is not a head",
    ),
    Kind(
        "already quantized",
        "Classic",
        "a model that `from_pretrained(quantization_config=...)` quantized",
        lambda: LanguageModel(quantized_llama()),
        text,
        adapted=LINEAR,
        note="recognised: its layers get the forward pass that keeps gradients",
    ),
    Kind(
        "already wrapped",
        "Classic",
        "a model that `peft.get_peft_model` wrapped",
        lambda: LanguageModel(wrapped_llama()),
        text,
        adapted=names("q_proj", "v_proj"),
        quantized=LINEAR,
        note="recognised: the adapters that are there train, in place",
    ),
    Kind(
        "encoder wrapped",
        "Classic",
        "a wrapped classifier whose head PEFT saves",
        lambda: LanguageModel(
            peft.get_peft_model(
                bert(),
                peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"]),
            )
        ),
        labelled,
        adapted=names("query", "value"),
        quantized=names("query", "key", "value", "dense"),
    ),
]

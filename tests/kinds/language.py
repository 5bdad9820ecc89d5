"""LightningModules around language models."""

from __future__ import annotations

import lightning.pytorch as L
import pytorch_lightning as pl
import torch
from models import bert_config, llama_config
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from .kind import Kind, names

TOKENS = 64


def ids(rows: int = 4, length: int = 8) -> torch.Tensor:
    return torch.randint(1, TOKENS, (rows, length))


def text(count: int = 4) -> list[dict[str, torch.Tensor]]:
    found = [ids() for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in found]


def llama(tied: bool) -> nn.Module:
    return LlamaForCausalLM(
        llama_config(
            vocab_size=TOKENS, hidden_size=32, intermediate_size=64, tie_word_embeddings=tied
        )
    )


def gpt2() -> nn.Module:
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, bos_token_id=0, eos_token_id=0, **size))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=TOKENS,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


class LanguageModel(pl.LightningModule):
    """The model is made in ``__init__``, as in most tutorials."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-2)


class LateLanguageModel(L.LightningModule):
    """The model is made in ``configure_model``, with a name-based group without weight decay."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lm = None

    def configure_model(self):
        if self.lm is None:
            self.lm = llama(self.hparams.tied)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def training_step(self, batch, batch_idx):
        return self(**batch)["loss"]

    def validation_step(self, batch, batch_idx):
        return self(**batch)["loss"]

    def configure_optimizers(self):
        plain = [p for n, p in self.named_parameters() if n.endswith(("bias", "norm.weight"))]
        decayed = [p for n, p in self.named_parameters() if not n.endswith(("bias", "norm.weight"))]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-2)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class SetupLanguageModel(pl.LightningModule):
    """The model is made in ``setup``."""

    def setup(self, stage):
        if not hasattr(self, "gpt"):
            self.gpt = gpt2()

    def training_step(self, batch, batch_idx):
        return {"loss": self.gpt(**batch).loss}

    def validation_step(self, batch, batch_idx):
        return self.gpt(**batch).loss

    def configure_optimizers(self):
        trained = filter(lambda p: p.requires_grad, self.gpt.parameters())
        return torch.optim.Adam(trained, lr=2e-2)


def labelled(count: int = 4, classes: int = 3) -> list[dict[str, torch.Tensor]]:
    found = [ids() for _ in range(count)]
    return [{"input_ids": x, "labels": x[:, 0] % classes} for x in found]


def bert() -> nn.Module:
    return BertForSequenceClassification(
        bert_config(vocab_size=TOKENS, intermediate_size=64, num_labels=3)
    ).eval()


class OwnHead(L.LightningModule):
    """A pretrained encoder and a fresh head of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ModernBertModel(
            ModernBertConfig(
                vocab_size=TOKENS,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=0,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
                reference_compile=False,
            )
        ).eval()
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(32, 3)

    def forward(self, input_ids):
        hidden = self.encoder(input_ids).last_hidden_state.mean(1)
        return self.classifier(self.dropout(hidden))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["input_ids"]), batch["labels"])

    validation_step = training_step

    def configure_optimizers(self):
        groups = [
            {"params": self.encoder.parameters(), "lr": 5e-3},
            {"params": self.classifier.parameters(), "lr": 1e-2},
        ]
        return torch.optim.AdamW(groups)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=TOKENS,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


QKVO = names("q_proj", "k_proj", "v_proj", "o_proj")
MLP = names("gate_proj", "up_proj", "down_proj")
BERT = names("query", "key", "value", "dense")

KINDS = [
    Kind(
        "causal",
        "Language",
        "transformers causal LM",
        lambda: LanguageModel(llama(tied=False)),
        text,
        adapted=QKVO | MLP,
    ),
    Kind(
        "causal tied",
        "Language",
        "transformers causal LM, input and output embeddings tied",
        lambda: LateLanguageModel(tied=True),
        text,
        adapted=QKVO | MLP,
        note="the tied output layer stays 16-bit",
    ),
    Kind(
        "gpt2",
        "Language",
        "GPT-2: `Conv1D` layers, fused qkv",
        SetupLanguageModel,
        text,
        adapted=names("c_attn", "c_proj", "c_fc"),
    ),
    Kind(
        "experts",
        "Language",
        "mixture of experts (Mixtral)",
        lambda: LanguageModel(mixtral()),
        text,
        adapted=QKVO | names("gate_up_proj_per_expert", "down_proj_per_expert"),
        note="attention and experts are adapted and quantized; transformers keeps all experts of "
        "a block in one parameter, where each has an adapter of its own",
    ),
    Kind(
        "classifier",
        "Language",
        "transformers encoder with its own fresh classification head",
        lambda: LanguageModel(bert()),
        labelled,
        adapted=BERT,
        note="the head trains in full",
    ),
    Kind(
        "own head",
        "Language",
        "transformers encoder with a head of the LightningModule",
        OwnHead,
        labelled,
        adapted=names("Wqkv", "Wo", "Wi"),
        note="the head is outside of the adapted part and trains in full",
    ),
    Kind(
        "encoder-decoder",
        "Language",
        "encoder-decoder (T5), which casts to `wo.weight.dtype`",
        lambda: LanguageModel(t5()),
        text,
        adapted=names("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    ),
    Kind(
        "embeddings",
        "Language",
        "transformers causal LM with an adapter on its embedding too",
        lambda: LanguageModel(llama(tied=False)),
        text,
        strategy={"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
        adapted=names("embed_tokens", "q_proj", "v_proj"),
        quantized=QKVO | MLP,
        note="embeddings are adapted where `target_modules` names them; they are not quantized",
    ),
]

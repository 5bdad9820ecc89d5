"""Tiny real models that tests of several rooms share. All values are random, none is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperTokenizer,
)

VOCABULARY = 61


def llama_config(**changes: Any) -> LlamaConfig:
    """The config of a Llama of 64 hidden units, so that NF4 blocks and odd shapes both occur."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **heads, **changes})


def bert_config(**changes: Any) -> BertConfig:
    """The config of a BERT of 32 hidden units."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return BertConfig(**{"vocab_size": VOCABULARY, "num_attention_heads": 2, **sizes, **changes})


def tiny_llama(tied: bool = False, layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random values, in eval mode."""
    config = llama_config(
        num_hidden_layers=layers, max_position_embeddings=64, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers are ``Conv1D`` and whose output is tied to its embedding."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


class Stack(nn.Module):
    """Plain linear layers with a head; 96 and 10 are not multiples of bitsandbytes' CPU blocks."""

    def __init__(self, width: int = 96, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(width, 64)
        self.second = nn.Linear(64, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(..., classes)`` for an input of shape ``(..., width)``."""
        hidden = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(hidden)))


def stack() -> Stack:
    """A plain stack of linear layers with a head."""
    return Stack()


def token_batch(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Token ids, mask and labels, as transformers' causal language models take them."""
    ids = torch.randint(0, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def whisper_tokenizer() -> WhisperTokenizer:
    """A tokenizer as Whisper's, for bytes, three languages and two tasks."""
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = WhisperTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    names = ("startoftranscript", "en", "zh", "de", "translate", "transcribe", "notimestamps")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    return tokenizer


class Holder(nn.Module):
    """A module whose model is loaded later, as in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None


def saved_in_shards(
    models: dict[str, Any], folders: pytest.TempPathFactory, size: str
) -> dict[str, Path]:
    """Saves each model in a folder of its own, in more than two files of at most ``size``."""
    found = {}
    for name, model in models.items():
        found[name] = folders.mktemp(name)
        model.save_pretrained(found[name], max_shard_size=size)
        assert len(list(found[name].glob("*.safetensors"))) > 2
    return found

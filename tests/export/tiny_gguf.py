"""Tiny models with tokenizers that GGUF files are written from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import GemmaTokenizer, PreTrainedTokenizerFast

import lightning_peft
from lightning_peft import engine
from lightning_peft.export.adapters import Adapter, find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.gguf.model import GgufModel, prepare_model

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words of two tokens each, so that merges matter.
WORDS = ("he", "ll", "lo", "th", "in", "er", "12", "23", "00", "\u0120t", "\u0120h", "an")


def byte_tokenizer(
    steps: Sequence[Any] | None = None,
    *,
    bos: bool = False,
    normalizer: Any = None,
    ignore_merges: bool = False,
    template: str | None = CHATML,
    ascii_only: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; ``steps`` split text into words, as GPT-2's by default.

    With ``ascii_only`` every token is text by itself, and none a part of a character.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if ascii_only:
        alphabet = [letter for letter in alphabet if letter.isascii()] + ["\u0120", "\u010a"]
    tokens = [*SPECIAL, *alphabet, *WORDS, "hello", "\u0120the", "123"]
    merges = [tuple(word) for word in WORDS]
    merges += [("\u0120t", "he"), ("12", "3")]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges
    )
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    steps = steps or [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, bos, template)


def split_by(pattern: str) -> list[Any]:
    """Splitting by a regular expression, and then into bytes."""
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def sentencepiece_tokenizer(
    *, legacy: bool = True, drop: Sequence[tuple[str, str]] = (), scheme: str = "always"
) -> PreTrainedTokenizerFast:
    """BPE as converted from SentencePiece's, with bytes for unknown characters."""
    pieces = ["\u2581h", "el", "lo", "\u2581hel", "\u2581hello", "th", "\u2581the", "12", "er"]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spaces = ["\u2581" * count for count in range(2, 6)]
    vocab = {token: index for index, token in enumerate([*tokens, *letters, *pieces, *spaces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    # These have one score, and are sorted by length.
    runs = [("\u2581" * left, "\u2581" * (n - left)) for n in range(2, 6) for left in range(1, n)]
    merges += sorted(runs, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
    merges = [pair for pair in merges if pair not in drop]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
    return _finished(backend, True, None, SPECIAL[:3])


def gemma_tokenizer() -> GemmaTokenizer:
    """Gemma's class, which puts its steps together itself, with the tokens of SentencePiece's."""
    described = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())["model"]
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    merges = [tuple(pair) for pair in described["merges"]]
    return GemmaTokenizer(vocab=described["vocab"], merges=merges, mask_token=None, **special)


def _finished(
    backend: Tokenizer, bos: bool, template: str | None, special: Sequence[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(special))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(name: str, **changes: Any) -> Any:
    """A model of transformers with random values, in eval mode."""
    cls = getattr(transformers, name)
    torch.manual_seed(11)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    fields = {"max_position_embeddings": 128, "initializer_range": 0.2, **ends}
    model = cls(cls.config_class(**{**sizes, **heads, **fields, **changes})).eval()
    for name, value in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            value.data += 0.1 * torch.randn_like(value)
    return model


def adapted(
    folder: Path, model: Any, tokenizer: Any = None, shards: str = "1GB", **settings: Any
) -> tuple[nn.Module, Adapter]:
    """Writes a base with its tokenizer, and an adapter; returns the model with it, and it."""
    model.save_pretrained(folder / "base", max_shard_size=shards)
    (tokenizer or byte_tokenizer(ascii_only=True)).save_pretrained(folder / "base")
    loaded = type(model).from_pretrained(folder / "base").eval()
    lightning_peft.inject(loaded, **({"r": 4} | settings))
    for layer in engine.adapted_layers(loaded).values():
        for factor in layer.factors("default"):
            factor.data.normal_(0, 0.1)
    lightning_peft.save_adapter(loaded, folder / "adapter")
    return loaded, find_adapter(str(folder / "adapter"))


def prepared(folder: Path, adapter: Adapter, kind: str = "f32") -> GgufModel:
    """Returns the model that is written of an adapter and the base in ``folder``."""
    return prepare_model(adapter, find_base(str(folder / "base")), kind, None, None)


def merged_file(folder: Path, adapter: Adapter, kind: str = "f32") -> Path:
    """Returns the file of an adapter merged into the base in ``folder``."""
    prepared(folder, adapter, kind).write_merged(folder / "model.gguf", kind, {}, silent)
    return folder / "model.gguf"


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""

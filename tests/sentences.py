"""Tiny encoders and decoders with a tokenizer of words, for tests of embeddings and rerankers."""

import json
import random
from importlib import import_module

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from trainer_fixtures import QUIET
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_peft import LoRAStrategy, QLoRAStrategy, engine
from lightning_peft.data.embedding import EmbeddingData
from lightning_peft.data.reranking import RerankingData
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ask:", "doc:"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
# What adapters of the two tasks say of themselves.
EMBEDDING = {
    "task": "lightning_peft.tasks.embedding.SentenceEmbedder",
    "output_settings": {"pooling": "lasttoken", "normalize": True, "similarity": "cosine"},
    "data": {"max_length": 20, "prompts": {"query": "ask: ", "document": "doc: "}},
}
RERANKER = {
    "task": "lightning_peft.tasks.reranker.Reranker",
    "output_settings": {"activation": "torch.nn.modules.activation.Sigmoid", "pad_token_id": 0},
}
STRATEGIES = {"lora": LoRAStrategy, "qlora": QLoRAStrategy}


def tokenizer_of(kind):
    """Returns the tokenizer of an encoder, or of a decoder, which ends each text with [SEP]."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first = "[CLS] " if kind == "bert" else ""
    made.post_processor = processors.TemplateProcessing(
        single=f"{first}$A [SEP]",
        pair=f"{first}$A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        model_max_length=64,
        model_input_names=names if kind == "bert" else names[::2],
    )


def model_in(folder, kind="bert", modules=None, prompts=None, **pooling):
    """Returns the name of a tiny model in ``folder``, of sentence-transformers with ``modules``."""
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    if kind == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        BertModel(BertConfig(**sizes, **still)).save_pretrained(folder)
    else:
        tokens = {"pad_token_id": 0, "eos_token_id": 3}
        LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    if modules is not None:
        paths = ["", "1_Pooling", "2_Normalize"]
        start = "sentence_transformers.models"
        listed = [
            {"idx": place, "name": str(place), "path": paths[place], "type": f"{start}.{name}"}
            for place, name in enumerate(modules)
        ]
        pooled = {"word_embedding_dimension": 64, **(pooling or {"pooling_mode_mean_tokens": True})}
        files = {
            "modules.json": listed,
            "1_Pooling/config.json": pooled,
            "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": prompts or {}},
        }
        (folder / "1_Pooling").mkdir()
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
    return str(folder)


def texts(count, start=0):
    """Returns texts of four to seven words, all different."""
    drawn = [random.Random(number) for number in range(start, start + count)]
    return [" ".join(chance.choices(WORDS, k=4 + place % 4)) for place, chance in enumerate(drawn)]


def rows_of(kind, count=16):
    """Returns rows: ``"pairs"``, ``"triples"`` or ``"scores"``."""
    first, second, third = texts(count), texts(count, 100), texts(count, 200)
    if kind == "scores":
        found = zip(first, second, strict=True)
        return [{"text_a": a, "text_b": b, "score": n % 5 / 4} for n, (a, b) in enumerate(found)]
    rows = [{"anchor": a, "positive": b} for a, b in zip(first, second, strict=True)]
    if kind == "triples":
        rows = [{**row, "negative": text} for row, text in zip(rows, third, strict=True)]
    return rows


def data_in(folder, model, kind, cls=EmbeddingData, **options):
    """Returns a data module of rows of ``kind``; a quarter of them is for validation."""
    file = folder / f"{kind}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows_of(kind))))
    given = {"batch_size": 4, "validation_share": 0.25, "cache_dir": str(folder / "c"), **options}
    return bind_to_lightning(cls, ROOTS[1])(str(file), model, **given)


def passages_in(folder, model, kind, **options):
    """Returns the same for rerankers."""
    return data_in(folder, model, kind, RerankingData, **options)


def trainer_of(kind=None, **options):
    """Returns a quiet Trainer on the CPU."""
    strategy = STRATEGIES[kind](r=4, announce=False) if kind else "auto"
    given = {"max_steps": 3, "enable_checkpointing": False, **QUIET, **options}
    return import_module(ROOTS[1]).Trainer(strategy=strategy, devices=1, accelerator="cpu", **given)


def random_adapter(folder, base, facts, cls=AutoModel, **options):
    """Writes an adapter with random weights, and returns the model that has it."""
    model = cls.from_pretrained(base, **options)
    engine.inject(model, r=4)
    chance = torch.Generator().manual_seed(2)
    for name, param in model.named_parameters():
        if param.requires_grad:
            size = 0.3 if "lora" in name else 0.5
            param.data = torch.randn(param.shape, generator=chance) * size
    engine.save_adapter(model, folder)
    file = folder / "provenance.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({**known, **facts}))
    return model.eval()

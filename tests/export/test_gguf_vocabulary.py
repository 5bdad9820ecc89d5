"""llama.cpp gives the tokens of transformers' tokenizer, or the tokenizer is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaCpp
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_peft import engine
from lightning_peft.errors import UnsupportedError
from lightning_peft.export.gguf.vocabulary import vocabulary_of

from .tiny_gguf import (
    adapted,
    byte_tokenizer,
    gemma_tokenizer,
    merged_file,
    prepared,
    sentencepiece_tokenizer,
    silent,
    split_by,
    tiny_model,
)

# As these models' own tokenizers say it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)]
KINDS: dict[str, tuple[str, Any]] = {
    "gpt-2": ("gpt-2", lambda: byte_tokenizer(bos=True)),
    "smollm": ("smollm", lambda: byte_tokenizer(DIGITS)),
    "llama3": ("llama-bpe", lambda: byte_tokenizer(split_by(LLAMA3), bos=True, ignore_merges=True)),
    "llama3 that merges": ("smaug-bpe", lambda: byte_tokenizer(split_by(LLAMA3))),
    "qwen2": ("qwen2", lambda: byte_tokenizer(split_by(QWEN2), normalizer=normalizers.NFC())),
    "tekken": ("tekken", lambda: byte_tokenizer(split_by(TEKKEN), bos=True, ignore_merges=True)),
    "sentencepiece": ("default", lambda: sentencepiece_tokenizer()),
    "metaspace": ("default", lambda: sentencepiece_tokenizer(legacy=False)),
    "no space first": (
        "default",
        lambda: sentencepiece_tokenizer(legacy=False, scheme="never"),
    ),
    "gemma": ("default", lambda: gemma_tokenizer()),
}
QUICK = ("gpt-2", "smollm", "sentencepiece", "gemma")
TEXTS = (
    "hello the other 1234567 hers",
    "Hello  THE\n\n  there's I'LL we'Re 12 123 1234",
    "\u00fcber 5\u20ac \u4f60\u597d \U0001f600\U0001f600 na\u00efve caf\u00e9\t\ttab",
    "<|im_start|>user\nhello hello<|im_end|>\n<s> the</s>hello",
    "x=[1,2];\r\n\r\n\tprint('a')  # ...!!! ???",
    " leading and trailing  ",
    "\u0661\u0662\u0663 \u00b2\u00bd \u0938\u094d\u0924\u0947 McDonald HTTPServer",
    "a  12 and   3  four",
    "hello      the         hello\n        12",
    "",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.long) for k in KINDS]
)
def test_same_tokens(kind: str, tmp_path: Path) -> None:
    name, build = KINDS[kind]
    tokenizer = build()
    model = tiny_model("LlamaForCausalLM", vocab_size=330, num_hidden_layers=1)
    _, adapter = adapted(tmp_path, model, tokenizer)
    model = prepared(tmp_path, adapter)
    assert model.vocabulary.pre == name
    model.write_merged(tmp_path / "model.gguf", "f32", {}, silent)
    llama = LlamaCpp(tmp_path / "model.gguf")
    # Of these, llama.cpp gives the tokens that are noted to be others.
    texts = [t for t in TEXTS if kind != "metaspace" or not ("<s> the" in t or t[:1] == " ")]
    for text in texts:
        assert llama.tokens(text) == tokenizer(text)["input_ids"], text
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokens(text, special=False) == plain, text


# SentencePiece's files are read back with spaces elsewhere: see the notes of such an export.
READ_BACK = [kind for kind in KINDS if kind in ("smollm", "gpt-2", "llama3 that merges", "qwen2")]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "smollm" else pytest.mark.long) for k in READ_BACK]
)
def test_a_file_is_read_with_the_same_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind][1]()
    model = tiny_model("LlamaForCausalLM", vocab_size=330, num_hidden_layers=1)
    _, adapter = adapted(tmp_path, model, tokenizer)
    found = engine.find_gguf(merged_file(tmp_path, adapter))
    assert found is not None
    read = AutoTokenizer.from_pretrained(found.folder)
    for text in TEXTS:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_space_before_the_first_word_alone(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(legacy=False, scheme="first")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    model = tiny_model("LlamaForCausalLM", vocab_size=330, num_hidden_layers=1)
    _, adapter = adapted(tmp_path, model, tokenizer)
    model = prepared(tmp_path, adapter)
    assert model.vocabulary.space_first is False
    assert any("conversations get the same tokens" in note for note in model.notes)
    model.write_merged(tmp_path / "model.gguf", "f32", {}, silent)
    llama = LlamaCpp(tmp_path / "model.gguf")
    turns = [("user", "hello the"), ("assistant", " the 12"), ("user", "hello")]
    talk = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(talk)["input_ids"]
    # llama.cpp leaves out what it adds to every text.
    assert llama.tokens(llama.prompt(talk)) == ids


def test_rows_without_tokens_and_kinds_of_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("[tool]", rstrip=True)])
    found = vocabulary_of(tokenizer, 300, "<|im_end|>")
    size = len(tokenizer)
    assert found.tokens[size:] == [f"[PAD{index}]" for index in range(size, 300)]
    assert found.types[:6] == [3, 3, 3, 3, 3, 1]
    assert found.types[size - 1 : size + 1] == [4, 5]
    assert found.special == {"bos": 1, "eos": 2, "unk": 0, "eot": 4}
    assert found.adds == {"bos": False, "eos": False}
    assert found.notes == [
        "these tokens take spaces around them, or stand alone, and in llama.cpp do not: [tool]"
    ]


def without_merges() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        unk_token="[UNK]",
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: byte_tokenizer(split_by(r"\w+|\s+")), r"splits text into words by .*known are"),
        (lambda: byte_tokenizer(split_by(LLAMA3 + "|x")), "splits text into words by"),
        (lambda: byte_tokenizer(split_by(QWEN2), ignore_merges=True), "ignore_merges=True"),
        (lambda: byte_tokenizer(normalizer=normalizers.Lowercase()), "changes text first.*Lower"),
        (
            lambda: byte_tokenizer([pre_tokenizers.ByteLevel(True, use_regex=True)]),
            "splits text into words by .*add_prefix_space",
        ),
        (
            lambda: sentencepiece_tokenizer(drop=[("\u2581hel", "lo")]),
            "1 pairs of tokens that make a token.*'\u2581hel lo'",
        ),
        (
            lambda: sentencepiece_tokenizer(legacy=False, scheme="first"),
            "before the first word of a text",
        ),
        (without_merges, r"has no eos_token(?s:.*)its model is WordPiece: only BPE"),
    ],
)
def test_others_are_refused(build: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        vocabulary_of(build(), 330)


def test_an_embedding_that_is_too_small() -> None:
    with pytest.raises(UnsupportedError, match="has 276 tokens, and the model's embedding 200 row"):
        vocabulary_of(byte_tokenizer(), 200)

"""Tokenizers of GGUF files: words as llama.cpp splits them, and tokens that have a row."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from gguf_models import VOCABULARY, write_gguf
from models import llama_config
from transformers import LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.data.tokenized import load_tokenizer
from lightning_peft.errors import UnsupportedError

pytest.importorskip("gguf", reason="needs the extra `gguf`")


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM(llama_config(vocab_size=VOCABULARY))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_named(folder: Path, model: Any, pre: str) -> str:
    fields = {"tokenizer.ggml.pre": pre}
    return str(write_gguf(folder / "x.gguf", model, fields=fields))


@pytest.mark.parametrize(
    ("pre", "words", "whole"),
    [
        ("olmo", ["a", "Ġ", "Ġ12345", "'", "S"], False),
        ("smollm", ["a", "ĠĠ", "1", "2", "3", "4", "5", "'", "S"], False),
        ("llama-bpe", ["a", "Ġ", "Ġ", "123", "45", "'S"], True),
        ("stablelm2", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "5", "'S"], False),
    ],
)
def test_words_are_those_of_llama_cpp(
    tmp_path: Path, model: Any, pre: str, words: list[str], whole: bool
) -> None:
    backend = load_tokenizer(write_named(tmp_path, model, pre)).backend_tokenizer
    split = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("a  12345'S")]
    assert (split, backend.model.ignore_merges) == (words, whole)


@pytest.mark.parametrize("pre", ["deepseek-llm", "default"])
def test_an_unknown_split_is_refused_with_the_tokenizer(
    tmp_path: Path, model: Any, pre: str
) -> None:
    name = write_named(tmp_path, model, pre)
    assert engine.load_config(name).vocab_size == VOCABULARY
    with pytest.raises(UnsupportedError, match=f"words by '{pre}'.*--data.tokenizer"):
        load_tokenizer(name)


def test_every_token_has_a_row(
    tmp_path: Path, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        tokenizer: Any = load_tokenizer(str(write_gguf(tmp_path / "x.gguf", model)))
    assert "x.gguf does not name how its tokenizer splits text into words" in caplog.text
    assert len(tokenizer) == VOCABULARY
    assert max(tokenizer("a <|endoftext|> b")["input_ids"]) < VOCABULARY
    assert tokenizer.unk_token is None
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")

"""GGUF files in folders with other files, and a cache that cannot be written to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import VOCABULARY, write_gguf
from models import llama_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.data.tokenized import load_tokenizer
from lightning_peft.demo.run import BASE
from lightning_peft.engine.loading import weight_files
from lightning_peft.errors import ConfigError, UnsupportedError

pytest.importorskip("gguf", reason="needs the extra `gguf`")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(llama_config(**sizes, **heads, tie_word_embeddings=True))
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(file, model, tensors=["output.weight"])


def test_files_next_to_it_are_another_models(written: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "models", tmp_path / "ran"
    folder.mkdir()
    file = shutil.copy(written, folder)
    shutil.copy(BASE / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text("another model's")
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    auto_map = {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto_map))
    tokenizer: Any = AutoTokenizer.from_pretrained(engine.readable_name(file))
    assert tokenizer.convert_ids_to_tokens(VOCABULARY - 1) is not None
    assert len(tokenizer.get_vocab()) < VOCABULARY + 2
    assert "message.content" in tokenizer.chat_template
    assert not ran.exists()


def test_a_cache_that_cannot_be_written_to_is_named(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "_SETTLED_NS", -1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(weight_files.hashes([written], tmp_path / "file" / "hashes")[0]) == 64
    with pytest.raises(ConfigError, match="cannot be kept in .*XDG_CACHE_HOME="):
        engine.load_config(written)


def test_a_config_of_wrong_types_is_refused_in_words(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config(vocab_size=VOCABULARY))
    # As files have it whose layers differ.
    fields = {"llama.attention.head_count_kv": [2, 2]}
    file = write_gguf(tmp_path / "x.gguf", model, fields=fields)
    with pytest.raises(UnsupportedError, match=r"cannot read it from GGUF.*num_key_value_heads"):
        engine.load_config(file)


@pytest.mark.parametrize("content", ['{"quant": "Q4"}', "[1]", '{"file": "/etc/passwd"}'])
def test_a_gguf_json_of_the_user_means_nothing(tmp_path: Path, content: str) -> None:
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "gguf.json").write_text(content)
    loaded = engine.load_pretrained_model(AutoModelForCausalLM, str(tmp_path / "model"))
    assert loaded.config.vocab_size == llama_config().vocab_size


def test_a_tokenizer_next_to_two_gguf_files_is_one(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert len(load_tokenizer(str(tmp_path))) == len(load_tokenizer(str(BASE)))

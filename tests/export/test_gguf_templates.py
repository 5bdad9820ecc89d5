"""Conversations are the same text for transformers, for llama.cpp, and for Ollama's template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaCpp

from lightning_peft.export.go_template import translate

from .go_rendering import go
from .test_go_template import TALK, TEMPLATES
from .tiny_gguf import adapted, byte_tokenizer, merged_file, tiny_model

QUICK = ("smollm2", "llama3", "mistral")
SYSTEM = [{"role": "system", "content": "Be kind."}]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("template")
    tokenizer = byte_tokenizer(bos=True)
    model = tiny_model("LlamaForCausalLM", vocab_size=300, num_hidden_layers=1)
    _, adapter = adapted(folder, model, tokenizer)
    return merged_file(folder, adapter), tokenizer


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.long) for n in TEMPLATES]
)
def test_the_same_text(name: str, written: tuple[Path, Any]) -> None:
    file, tokenizer = written
    template = TEMPLATES[name]
    llama, turns = LlamaCpp(file, template=template), translate(tokenizer, template)
    assert turns is not None
    opening = [] if name == "no system" else SYSTEM
    for messages in (TALK, TALK[:3], TALK[:1], [*opening, *TALK], [*opening, *TALK[:1]]):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        # Both put the token themselves before every text.
        expected = expected.removeprefix(tokenizer.bos_token)
        assert llama.prompt(messages) == expected
        assert go(turns.as_go(tokenizer.bos_token), messages) == expected

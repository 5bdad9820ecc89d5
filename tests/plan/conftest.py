"""Configs without weights, and the two measured against each other: planner and real layers."""

import json

import pytest

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {
    **LLAMA_3_8B, "dtype": "float32", "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Makes a folder that holds only a config."""

    def make(**fields):
        (tmp_path / "config.json").write_text(json.dumps({**SMALL, **fields}))
        return tmp_path

    return make


@pytest.fixture
def llama_3_8b(tmp_path):
    """The folder of the 8B model of the published figures."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return tmp_path

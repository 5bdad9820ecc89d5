"""llama.cpp gives transformers' logits for every architecture that is written as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import LlamaCpp

import lightning_peft
from lightning_peft.export.gguf.architectures import FAMILIES

from .tiny_gguf import adapted, merged_file, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "llama3 positions": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "linear positions": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "mixtral": (
        "MixtralForCausalLM",
        {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("GemmaForCausalLM", {"num_key_value_heads": 1, "head_dim": 32}),
}
IDS = [1, 70, 71, 100, 3, 90, 91, 92, 4, 110, 50, 60, 33, 34, 35, 36, 37, 38, 39, 40]
# llama.cpp looks Gemma's activation up in a table of float16 values.
TOLERANCES = {"gemma": 5e-3}


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def of_all(row: dict[int, float]) -> torch.Tensor:
    """Returns the log-probabilities by llama.cpp of all tokens of the vocabulary."""
    return torch.tensor([row[index] for index in range(128)])


def test_every_family_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(FAMILIES)


# The others take seconds.
QUICK = ("llama", "qwen2")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.long) for c in CASES]
)
def test_same_logits(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    model, adapter = adapted(tmp_path, tiny_model(name, **changes))
    file = merged_file(tmp_path, adapter)
    lightning_peft.merge(model, dtype=torch.float32)
    found = LlamaCpp(file).continued(IDS, 5, top=128)
    ids, rows = list(IDS), found["logprobs"]
    assert len(rows) == len(found["tokens"]) > 0
    for token, row in zip(found["tokens"], rows, strict=True):
        expected = logprobs(model, ids)
        assert token == int(expected.argmax())
        torch.testing.assert_close(of_all(row), expected, atol=TOLERANCES.get(case, 2e-4), rtol=0)
        ids.append(token)

"""Small models of experts, by the names of their families."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3": Qwen3MoeConfig(**SIZES, **ROUTED, head_dim=8, num_experts=4),
    "dense layer": Qwen3MoeConfig(
        **SIZES, **ROUTED, head_dim=8, num_experts=4, mlp_only_layers=[0]
    ),
    "glm4": Glm4MoeConfig(**SIZES, **ROUTED, **GROUPS, head_dim=8),
    "deepseek": DeepseekV3Config(**{**SIZES, **ROUTED, **GROUPS, **LATENT}),
    "gpt-oss": GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "llama4": Llama4TextConfig(
        **SIZES, head_dim=8, num_local_experts=4, intermediate_size_mlp=48,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip


def model_of(kind="qwen3", way="grouped_mm", **given):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    config.update(given)
    # Llama 4 has a way of its own.
    way = "eager" if kind == "llama4" else way
    return AutoModelForCausalLM.from_config(config, experts_implementation=way).eval()

"""Small configurations of transformers' model classes, and inputs for them.

A configuration is the class's default with its sizes replaced by name, so that no model needs an
entry of its own unless its sizes depend on each other.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 96
# The first pattern that matches the whole name of a field gives its size.
SIZES: list[tuple[str, int]] = [
    (r"rotary_dim", 8),
    (r"(.*_)?vocab_size|vocabulary_size|n_token|vocab_size_per_layer_input", VOCABULARY),
    (r"(.*_)?(pad|bos|eos|unk|sep|cls|mask|decoder_start)_(token_)?id(x)?", 1),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads|num_key_value_groups)", 2),
    (r"num_attention_groups|n_groups?|mamba_n_groups|mamba_ngroups", 1),
    (
        r"(.*_)?(num_experts_per_tok|num_experts_per_token|top_k|moe_topk|topk|"
        r"moe_top_k|num_selects)",
        2,
    ),
    (r"(.*_)?(topk_group|n_group)", 1),
    (
        r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|"
        r"n_experts|num_routed_experts)",
        4,
    ),
    (r"(.*_)?(n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (
        r"(.*_)?(head_dim|v_head_dim|qk_nope_head_dim|kv_channels|"
        r"attention_head_dim|head_size|d_kv|linear_key_head_dim|"
        r"linear_value_head_dim|dim_head)",
        8,
    ),
    (r"(.*_)?qk_rope_head_dim|index_head_dim", 8),
    (r"(.*_)?(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)", 16),
    (
        r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|"
        r"encoder_attention_heads|decoder_attention_heads|linear_num_key_heads|"
        r"linear_num_value_heads|index_n_heads)",
        4,
    ),
    (
        r"(.*_)?(num_hidden_layers|n_layers?|num_layers|encoder_layers|"
        r"decoder_layers|num_blocks|depth|num_decoder_layers|num_encoder_layers|"
        r"num_conv_layers)",
        2,
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|dff|"
        r"ff_dim|moe_intermediate_size|ffn_intermediate_size|"
        r"shared_intermediate_size|mlp_dim|d_inner|dim_feedforward|block_ff_dim|"
        r"intermediate_dim)",
        48,
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|width|"
        r"hidden_dim|d_embed|embedding_dim|dim_model|encoder_hidden_size|"
        r"word_embed_proj_dim|lru_width|projection_dim|output_dim|projector_dim|"
        r"channels)",
        32,
    ),
    (
        r"(.*_)?(max_position_embeddings|n_positions|max_seq_len|n_ctx|"
        r"max_sequence_length|seq_length|sliding_window|attention_window|"
        r"max_source_positions|max_target_positions|"
        r"original_max_position_embeddings|n_position)",
        64,
    ),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size|tubelet_size", 8),
    (r"(.*_)?(state_size|ssm_state_size|mamba_d_state|mamba_state_dim|d_state)", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"num_mel_bins|feature_size|num_channels_mel", 16),
    (r"num_frames", 2),
    (r"moe_k|num_activated_experts", 2),
    (r"blank_token_id", 0),
    (r"(.*_)?num_group_norm_groups|num_groups", 4),
]  # fmt: skip
LISTS: list[tuple[str, list[int]]] = [
    (r"hidden_sizes|embed_dims|neck_hidden_sizes|encoder_hidden_sizes|embed_dim", [16, 32, 32, 32]),
    (r"depths|num_blocks|layers", [1, 1, 1, 1]),
    (r"num_heads|num_attention_heads", [2, 2, 2, 2]),
]
# Sizes that some classes leave to the user.
UNSET = {"head_dim": 8, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
# Fields that depend on others and that the class works out by itself.
DERIVED = re.compile(
    r"layer_types|.*_layer_types|layers_block_type|block_types?|attention_types|mlp_layer_types"
    r"|no_rope_layers|head_dim_ratio|attn_layer_indices|.*_indexes|.*_indices|stage_names"
    r"|out_features|rope_(scaling|parameters|theta)|torch_dtype|dtype|architectures"
    r"|transformers_version|id2label|label2id|auto_map|_.*"
)


def small(model_type: str, own: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Returns a small configuration.

    Args:
        model_type: As of ``AutoConfig``.
        own: Fields that are given, of the configuration or of a part of it.
    """
    default = AutoConfig.for_model(model_type)
    fields = {**reduced(default), **(own or {})}
    return type(default)(**fields)


def reduced(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the fields of ``config`` that are sizes, made small; its parts as dictionaries."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = {"model_type": value.model_type, **reduced(value)}
        elif DERIVED.fullmatch(name) or isinstance(value, bool):
            continue
        elif isinstance(value, int):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                found[name] = min(size, value) if value > 0 else value
        elif value is None and name in UNSET:
            found[name] = UNSET[name]
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            sizes = next((sizes for pattern, sizes in LISTS if re.fullmatch(pattern, name)), None)
            if sizes is not None:
                found[name] = (sizes * len(value))[: len(value)]
    heads = vars(config).get("num_attention_heads")
    if heads is not None and vars(config).get("num_key_value_heads") == heads:
        # Latent attention repeats nothing.
        found["num_key_value_heads"] = found.get("num_attention_heads", heads)
    if hasattr(config, "use_cache"):
        found["use_cache"] = False
    return found


def inputs(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Returns two inputs for ``model``, with what its forward pass needs besides."""
    torch.manual_seed(3)
    taken = set(inspect.signature(model.forward).parameters)
    limit = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
    ids = torch.randint(3, min(int(limit), VOCABULARY), (2, 12))
    main = model.main_input_name
    if main == "input_ids" or (main == "inputs" and "MaskedLM" in type(model).__name__):
        found = {main: ids}
        if "attention_mask" in taken:
            found["attention_mask"] = torch.ones_like(ids)
    elif main in ("pixel_values", "inputs"):
        found = {main: _images(config)}
    elif main == "input_features":
        found = {main: _spectrograms(model, config)}
    elif hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        found = {main: torch.randn(2, config.max_length, config.num_mel_bins)}
    else:
        found = {main: torch.randn(2, 4000)}
    if "decoder_input_ids" in taken and config.is_encoder_decoder:
        found["decoder_input_ids"] = ids[:, :6]
    return found


def _part(config: Any, *names: str) -> Any:
    return next((p for name in names if (p := getattr(config, name, None))), config)


def _images(config: Any) -> torch.Tensor:
    vision = _part(config, "encoder", "vision_config")
    size = getattr(vision, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    return torch.randn(2, getattr(vision, "num_channels", 3), int(height), int(width))


def _spectrograms(model: Any, config: Any) -> torch.Tensor:
    audio = _part(config, "audio_config", "encoder_config")
    names = (
        "num_mel_bins",
        "feature_projection_input_dim",
        "input_feat_per_channel",
        "feature_size",
        "input_dim",
    )
    bins = next((int(size) for name in names if (size := getattr(audio, name, None))), 80)
    frames = 2 * int(getattr(audio, "max_source_positions", 32) or 32)
    whisper = type(model).__name__.startswith("Whisper")
    return torch.randn((2, bins, frames) if whisper else (2, frames, bins))

"""What a few configurations need besides small sizes, by class or by model type."""

from __future__ import annotations

from typing import Any

_SWIN = {
    "image_size": 32, "patch_size": 4, "depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16,
    "window_size": 4,
}  # fmt: skip
_NORMAL = {"rope_type": "default", "rope_theta": 10000.0}
_BY_TYPE = {"full_attention": _NORMAL, "sliding_attention": _NORMAL}

OWN: dict[str, dict[str, Any]] = {
    "bit": {"hidden_sizes": [32, 32, 32, 32], "embedding_size": 32},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"], "rope_parameters": _BY_TYPE,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": _SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "efficientnet": {
        "image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 64,
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 5, "intermediate_size": [48] * 5, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 5, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hgnet_v2": {
        "embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32],
        "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 16, 32, 32],
        "hidden_sizes": [16, 16, 32, 32], "stage_numb_of_layers": [1, 1, 1, 1],
        "stage_num_blocks": [1, 1, 1, 1],
    },
    "levit": {
        "image_size": 64, "hidden_sizes": [32, 32, 32], "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 4, 2, 2, 2]],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "zero_expert_num": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mobilebert": {
        "intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32,
        "hidden_size": 32,
    },
    "mobilevitv2": {"image_size": 128},
    "moonshine": {
        "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
        "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
    },
    "neomme": {
        "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": _BY_TYPE,
    },
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1, "image_size": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [3, 4]},
    "ReformerModelWithLMHead": {
        "is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [3, 4],
    },
    "rwkv": {"rescale_every": 1},
    "swin": _SWIN,
    "textnet": {"image_size": [32, 32], "stem_out_channels": 16, "hidden_sizes": [16] * 5},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 2, "layer_types": ["mamba", "hybrid"], "n_mamba_heads": 8,
        "mamba_headdim": 8, "attention_head_dim": 16, "attention_hidden_size": 64,
        "num_key_value_heads": 4, "hybrid_layer_ids": [1],
    },
}  # fmt: skip

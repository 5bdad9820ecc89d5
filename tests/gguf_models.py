"""Small GGUF files: a Llama as llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_peft.demo.run import BASE

# Of the tokenizer, which is the start of that of the demo's base.
VOCABULARY = 600
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path, model: Any, kind: str = "F32", architecture: str = "llama", **left_out: Any
) -> Path:
    """Writes a Llama with the tokenizer of the demo's base.

    Args:
        path: The file.
        model: A ``LlamaForCausalLM``.
        kind: ggml's name of the type of matrices; vectors are float32.
        architecture: What the file says that it is.
        left_out: ``tensors``, names in the file that are left out; ``more``, tensors that the
            model does not have; ``fields``, metadata that is added or replaced.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer)
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in left_out.get("fields", {}).items():
        adders.get(type(value), writer.add_array)(key, value)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        written = gguf_name(name)
        if written in left_out.get("tensors", ()):
            continue
        count = heads.get(written.split(".")[-2])
        array = (value if count is None else interleaved(value, count)).float().numpy()
        quantized = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = gguf.quantize(array, quantized)
        writer.add_tensor(written, data, raw_dtype=quantized)
    for name, array in left_out.get("more", {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """Returns llama.cpp's name of a parameter."""
    body, _, leaf = name.rpartition(".")
    if not body.startswith("model.layers."):
        return f"{_NAMES[body]}.{leaf}"
    number, _, rest = body.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_NAMES[rest]}.{leaf}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns a projection with the halves of each head interleaved, as llama.cpp rotates them."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any) -> None:
    """Adds the start of the tokenizer of the demo's base."""
    written = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    # The first tokens are single bytes, and each merge makes one more.
    tokens = sorted(written["vocab"], key=written["vocab"].get)[:VOCABULARY]
    merges = written["merges"][: VOCABULARY - 259]
    special = {"<pad>", "<s>", "</s>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    )


def zeros(*shape: int) -> np.ndarray:
    """Returns a float32 array of zeros."""
    return np.zeros(shape, dtype=np.float32)

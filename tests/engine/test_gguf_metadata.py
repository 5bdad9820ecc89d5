"""A GGUF file's numbers of positions and attention, which transformers reads in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_models import VOCABULARY, add_tokenizer, zeros

from lightning_peft import engine
from lightning_peft.errors import UnsupportedError

gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(folder: Path, architecture: str, fields: dict[str, Any], layers: int = 2) -> Any:
    """Writes a file without layers, and returns the config that is read from it."""
    writer = gguf.GGUFWriter(folder / "x.gguf", architecture)
    writer.add_context_length(4096)
    writer.add_block_count(layers)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    adders = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in fields.items():
        adders[type(value)](f"{architecture}.{key}", value)
    add_tokenizer(writer)
    writer.add_tensor("token_embd.weight", zeros(VOCABULARY, 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return engine.load_config(folder / "x.gguf")


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("architecture", "fields", "rope"),
    [
        ("llama", LINEAR, {"rope_theta": 5000.0, "rope_type": "linear", "factor": 8.0}),
        ("llama", {"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            "qwen2",
            YARN | {"rope.scaling.original_context_length": 1024},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        ),
        ("qwen3", YARN | {"attention.key_length": 16}, {"original_max_position_embeddings": 4096}),
        ("starcoder2", {}, {"rope_theta": 5000.0, "rope_type": "default"}),
        ("stablelm", {"rope.dimension_count": 8}, {"partial_rotary_factor": 0.5}),
        ("phi3", {"rope.dimension_count": 12}, {"partial_rotary_factor": 0.75}),
    ],
)
def test_positions_are_those_of_the_file(
    tmp_path: Path, architecture: str, fields: dict[str, Any], rope: dict[str, Any]
) -> None:
    assert rope.items() <= config_of(tmp_path, architecture, fields).rope_parameters.items()


def test_gemma_scales_the_layers_that_attend_to_all(tmp_path: Path) -> None:
    sizes = {"attention.key_length": 32, "attention.value_length": 32}
    config = config_of(tmp_path, "gemma3", LINEAR | sizes | {"attention.sliding_window": 512})
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert (config.head_dim, config.sliding_window) == (32, 512)


@pytest.mark.parametrize(
    ("architecture", "layers", "divisor"),
    [("gemma2", 46, 16), ("gemma2", 42, 32), ("gemma3", 62, 16), ("gemma3", 48, 32)],
)
def test_scores_of_gemma_are_divided_as_by_llama_cpp(
    tmp_path: Path, architecture: str, layers: int, divisor: int
) -> None:
    sizes = {"attention.key_length": 32, "attention.value_length": 32}
    config = config_of(tmp_path, architecture, sizes | {"final_logit_softcapping": 25.0}, layers)
    assert config.num_hidden_layers == layers
    assert config.query_pre_attn_scalar == divisor
    assert config.final_logit_softcapping == 25.0


def test_heads_and_windows_are_those_of_the_file(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen3", {"attention.key_length": 32}).head_dim == 32
    assert config_of(tmp_path, "phi3", {"attention.sliding_window": 2047}).sliding_window == 2047


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("llama", {"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type='longrope'"),
        ("llama", LINEAR | {"rope.scaling.attn_factor": 1.5}, r"rope\.scaling\.attn_factor=1\.5"),
        ("llama", {"attention.sliding_window": 128}, r"llama\.attention\.sliding_window=128"),
        ("qwen2", {"attention.key_length": 32}, r"Qwen2Config.*qwen2\.attention\.key_length=32"),
        ("qwen2", {"rope.dimension_count": 8}, r"qwen2\.rope\.dimension_count=8"),
        (
            "llama",
            {"rope.dimension_count": 8, "attention.key_length": 16, "attention.value_length": 8},
            r"(?s)llama\.attention\.value_length=8.*llama\.rope\.dimension_count=8",
        ),
    ],
)
def test_what_the_config_has_no_place_for_is_refused(
    tmp_path: Path, architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        config_of(tmp_path, architecture, fields)

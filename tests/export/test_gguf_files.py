"""GGUF files hold what was merged, exactly as far as their numbers go, or are not there."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from llama_cpp import LlamaCpp
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import CheckpointError, UnsupportedError
from lightning_peft.export.adapters import Adapter, find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.gguf import lora
from lightning_peft.export.gguf.architectures import architecture_of
from lightning_peft.export.gguf.exporting import as_gguf
from lightning_peft.export.gguf.files import kind_of
from lightning_peft.export.merged_folder import merge_into_folder
from lightning_peft.export.request import ExportRequest

from .test_gguf_architectures import CASES, IDS, LINEAR, LLAMA3, logprobs, of_all
from .test_merged_folder import peak_bytes
from .tiny_gguf import CHATML, adapted, byte_tokenizer, merged_file, prepared, silent, tiny_model

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


def facts(file: Path) -> dict[str, object]:
    fields = GGUFReader(file).fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("f32", marks=pytest.mark.long),
        "f16",
        pytest.param("bf16", marks=pytest.mark.long),
        "q8_0",
    ],
)
def test_numbers_of_each_kind(kind: str, tmp_path: Path) -> None:
    model, adapter = adapted(
        tmp_path,
        tiny_model("LlamaForCausalLM", intermediate_size=80),
    )
    file = merged_file(tmp_path, adapter, kind)
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    lightning_peft.merge(model, dtype=dtype)
    lightning_peft.unload(model)
    state, found = model.state_dict(), tensors(file)
    # Rows of 80 numbers are not blocks of 32.
    types = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == ("F16" if kind == "q8_0" else kind.upper())
    assert types["blk.1.attn_norm.weight"] == "F32"
    for there, here in {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    }.items():
        expected = state[here].to(dtype).float().numpy()
        if kind == "q8_0":
            # The largest of 32 numbers is 127 steps, whose size is a float16.
            step = np.abs(expected.reshape(-1, 32)).max(1, keepdims=True) / 127
            error = np.abs(found[there].reshape(-1, 32) - expected.reshape(-1, 32))
            assert (error <= 0.6 * step).all()
            assert error.max() > 0
        else:
            np.testing.assert_array_equal(found[there], expected)
    q = state["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    if kind == "f32":
        # A pair that turns together: half a head apart here, and neighbours there.
        np.testing.assert_array_equal(found["blk.0.attn_q.weight"][16 + 2], q[16 + 1])
        np.testing.assert_array_equal(found["blk.0.attn_q.weight"][16 + 3], q[16 + 8 + 1])
    known = facts(file)
    assert known["general.architecture"] == "llama"
    assert known["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]
    assert known["tokenizer.chat_template"] == CHATML


def eight_bits(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Rounds what goes into a layer to 127 steps, whose size is a float16, for 32 numbers each."""
    blocks = args[0].reshape(*args[0].shape[:-1], -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return (((blocks / step).round() * step.half().float()).reshape(args[0].shape),)


@pytest.mark.long
@pytest.mark.parametrize("layers", [1, 2])
def test_llama_cpp_rounds_inputs_of_eight_bit_layers(layers: int, tmp_path: Path) -> None:
    base = tiny_model("LlamaForCausalLM", num_hidden_layers=layers)
    _, adapter = adapted(tmp_path, base)
    file = merged_file(tmp_path, adapter, "q8_0")
    # With the weights as they are in the file.
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).eval()
    found = LlamaCpp(file).continued(IDS, 1, top=128)["logprobs"][0]
    actual = of_all(found)
    exact = logprobs(model, IDS)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(eight_bits)
    rounded = logprobs(model, IDS)
    assert (actual - exact).abs().max() > 0.02
    torch.testing.assert_close(actual, rounded, atol=1e-4, rtol=0)


def test_which_numbers_a_tensor_gets() -> None:
    assert kind_of("output_norm.weight", (64,), "f16") == "f32"
    assert kind_of("output.weight", (3, 64), "q8_0") == "q8_0"
    assert kind_of("output.weight", (3, 48), "q8_0") == "f16"


@pytest.mark.parametrize("kind", [pytest.param("f16", marks=pytest.mark.long), "q8_0"])
def test_experts_keep_their_numbers(kind: str, tmp_path: Path) -> None:
    name, changes = CASES["qwen3moe"]
    # In the order of files, expert 10 comes before expert 2.
    model = tiny_model(name, **changes | {"num_experts": 12, "num_hidden_layers": 1})
    model.half().float()
    _, adapter = adapted(tmp_path, model, target_modules=["q_proj"])
    prepared(tmp_path, adapter, kind).write_base(tmp_path / "base.gguf", kind, {}, silent)
    file = merged_file(tmp_path, adapter, kind)
    base, merged = tensors(tmp_path / "base.gguf"), tensors(file)
    assert base.keys() == merged.keys()
    differing = [one for one, value in base.items() if not np.array_equal(value, merged[one])]
    assert differing == ["blk.0.attn_q.weight"]
    types = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    experts = model.model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, 1)
    for kept, value in {"gate": gate, "up": up, "down": experts.down_proj.detach()}.items():
        there = f"blk.0.ffn_{kept}_exps.weight"
        assert types[there] == kind.upper()
        step = value.abs().max() / (127 if kind == "q8_0" else 1024)
        torch.testing.assert_close(torch.tensor(base[there]), value, atol=float(step), rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=False: llama.cpp divides"),
        ({"mlp_only_layers": [0]}, "blocks without experts among others"),
        ({"decoder_sparse_step": 2}, "blocks without experts among others"),
    ],
)
def test_experts_that_llama_cpp_does_not_compute(changes: dict, message: str) -> None:
    config = Qwen3MoeConfig(**{"norm_topk_prob": True, **changes})
    with pytest.raises(UnsupportedError, match=message):
        architecture_of("Qwen3MoeForCausalLM", config)


def apart(folder: Path, adapter: Adapter) -> tuple[Path, Path]:
    """Writes base and adapter to files of their own."""
    found = prepared(folder, adapter)
    lora.check_adapter(found.merge, found.architecture)
    found.write_base(folder / "base.gguf", "f32", {}, silent)
    outline, file = found.merge.outline, folder / "adapter.gguf"
    lora.write_adapter(file, outline, found.architecture, "f32", "mine", silent)
    return folder / "base.gguf", file


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ],
)
def test_an_adapter_file_is_the_merged_model(settings: dict, tmp_path: Path) -> None:
    settings = {"target_modules": LAYERS, **settings}
    base = tiny_model("LlamaForCausalLM")
    model, adapter = adapted(tmp_path, base, **settings)
    alone, file = apart(tmp_path, adapter)
    known = facts(file)
    assert known["general.type"] == "adapter"
    assert known["adapter.type"] == "lora"
    assert len(tensors(file)) == 2 * 2 * len(LAYERS)
    assert tensors(file)["blk.1.attn_v.weight.lora_a"].shape == (2 if len(settings) > 1 else 4, 64)
    plain = LlamaCpp(alone).continued(IDS, 3, top=128)
    found = LlamaCpp(alone, file).continued(IDS, 3, top=128)
    lightning_peft.merge(model, dtype=torch.float32)
    expected = logprobs(model, IDS)
    actual = of_all(found["logprobs"][0])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    assert (of_all(plain["logprobs"][0]) - expected).abs().max() > 0.1


@pytest.mark.long
def test_an_adapter_on_the_embedding(tmp_path: Path) -> None:
    base = tiny_model("Qwen2ForCausalLM", tie_word_embeddings=False)
    targets = ["embed_tokens", "lm_head", "q_proj"]
    model, adapter = adapted(tmp_path, base, target_modules=targets)
    files = apart(tmp_path, adapter)
    lightning_peft.merge(model, dtype=torch.float32)
    found = LlamaCpp(*files).continued(IDS, 1, top=128)
    actual = of_all(found["logprobs"][0])
    torch.testing.assert_close(actual, logprobs(model, IDS), atol=2e-4, rtol=0)


def test_more_than_low_rank_factors(tmp_path: Path) -> None:
    base = tiny_model("LlamaForCausalLM", tie_word_embeddings=False)
    model, adapter = adapted(tmp_path, base, modules_to_save=["lm_head"])
    written = prepared(tmp_path, adapter)
    with pytest.raises(UnsupportedError, match=r"holds whole tensors(?s:.*)lm_head\.weight"):
        lora.check_adapter(written.merge, written.architecture)
    written.write_merged(tmp_path / "model.gguf", "f32", {}, silent)
    head: nn.Module = model.get_submodule("lm_head")
    expected = head.weight.detach().numpy()
    np.testing.assert_array_equal(tensors(tmp_path / "model.gguf")["output.weight"], expected)


def test_an_adapter_on_experts_is_no_file_of_its_own(tmp_path: Path) -> None:
    name, changes = CASES["mixtral"]
    _, adapter = adapted(tmp_path, tiny_model(name, **changes, num_hidden_layers=1))
    written = prepared(tmp_path, adapter)
    with pytest.raises(UnsupportedError, match=r"not plain LoRA on linear layers.*mlp\.experts"):
        lora.check_adapter(written.merge, written.architecture)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GPT2LMHeadModel", {}, "GPT2LMHeadModel is not written as GGUF here: LlamaForCausalLM, M"),
        (
            "LlamaForCausalLM",
            {"hidden_act": "relu", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            r"scaled by 'dynamic'(?s:.*)hidden_act='relu': llama.cpp computes with 'silu'",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5: llama.cpp turns whole heads",
        ),
        (
            "GemmaForCausalLM",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention=True",
        ),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias=True: llama.cpp's 'qwen3'"),
    ],
)
def test_other_architectures(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    model = tiny_model(name, **changes)
    targets = ["c_attn"] if name.startswith("GPT2") else ["q_proj"]
    _, adapter = adapted(tmp_path, model, target_modules=targets)
    with pytest.raises(UnsupportedError, match=message):
        prepared(tmp_path, adapter)


def test_a_head_of_its_own_in_a_base_whose_config_ties_it(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    byte_tokenizer(ascii_only=True).save_pretrained(tmp_path / "base")
    # Which does not tie them, as the files hold other values.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    head = model.lm_head.weight.detach().clone()
    assert not torch.equal(head, model.model.embed_tokens.weight)
    lightning_peft.inject(model, r=4)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    adapter, base = find_adapter(str(tmp_path / "adapter")), find_base(str(tmp_path / "base"))
    merge_into_folder(adapter, tmp_path / "merged", base)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(merged.lm_head.weight, head.bfloat16().float())
    file = merged_file(tmp_path, adapter)
    np.testing.assert_array_equal(tensors(file)["output.weight"], head.numpy())


def test_rows_of_a_tied_embedding_that_the_files_call_the_head(tmp_path: Path) -> None:
    file = tmp_path / "base" / "model.safetensors"
    tiny_model("LlamaForCausalLM", tie_word_embeddings=True).save_pretrained(file.parent)
    byte_tokenizer(ascii_only=True).save_pretrained(file.parent)
    named = load_file(file)
    named["lm_head.weight"] = named.pop("model.embed_tokens.weight")
    save_file(named, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(file.parent)
    lightning_peft.inject(model, r=2, trainable_token_indices=[3, 7])
    for param in engine.all_adapter_parameters(model):
        param.data.normal_()
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    written = tensors(merged_file(tmp_path, find_adapter(str(tmp_path / "adapter"))))
    rows: nn.Module = model.get_submodule("model.embed_tokens")
    expected = rows.effective_weight().detach().numpy()
    np.testing.assert_allclose(written["token_embd.weight"], expected, rtol=1e-6)
    assert "output.weight" not in written


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("Qwen2ForCausalLM", {}, None),
        ("LlamaForCausalLM", {"attention_bias": True}, "the biases"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "the biases"),
        ("LlamaForCausalLM", {"rope_parameters": LINEAR}, "the scaled positions"),
        ("LlamaForCausalLM", {"rope_parameters": LLAMA3}, "the scaled positions"),
        ("MistralForCausalLM", {"sliding_window": 16}, "the window"),
    ],
)
def test_what_transformers_does_not_read(name: str, changes: dict, lost: str | None) -> None:
    assert architecture_of(name, tiny_model(name, **changes).config).not_read_back == lost


@pytest.mark.parametrize("case", ["qwen2", "llama wide heads", "llama biases"])
def test_the_measured_error(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    model = tiny_model(name, **{"num_hidden_layers": 1, "vocab_size": 300, **changes})
    _, adapter = adapted(tmp_path, model, byte_tokenizer())
    base = find_base(str(tmp_path / "base"))
    found = as_gguf(ExportRequest(adapter, base, tmp_path / "out", None, {}, outtype="f32"))["gguf"]
    if case == "llama biases":
        assert found["logit_error"] is None
        assert found["not_measured"] == "transformers does not read the biases of this GGUF file"
    else:
        assert found["logit_error"]["relative"] < 1e-4


def test_a_window_of_attention_is_the_context(tmp_path: Path) -> None:
    model = tiny_model("MistralForCausalLM", sliding_window=16, num_hidden_layers=1)
    _, adapter = adapted(tmp_path, model)
    written = prepared(tmp_path, adapter)
    assert written.architecture.context == 16
    assert written.notes == [
        "the model attends to the last 16 tokens, and llama.cpp to all: the file names a context "
        "of 16, up to which they are the same"
    ]


@pytest.mark.long
def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM", intermediate_size=80)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = 1e5
    _, adapter = adapted(tmp_path, model)
    for kind, message in (("f16", "down_proj.weight would hold values that"), ("q8_0", "65504")):
        with pytest.raises(CheckpointError, match=message):
            merged_file(tmp_path, adapter, kind)
    merged_file(tmp_path, adapter, "bf16")


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 8}
    model = tiny_model("LlamaForCausalLM", **sizes)
    total = sum(4 * param.numel() for param in model.parameters())
    largest = max(4 * param.numel() for param in model.parameters())
    _, adapter = adapted(tmp_path, model, shards="1MB", target_modules=["q_proj"])
    written = prepared(tmp_path, adapter)
    tracemalloc.start()
    peak = peak_bytes(lambda: written.write_merged(tmp_path / "x.gguf", "q8_0", {}, silent))
    # What numpy allocates, which torch does not count.
    encoded = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.gguf").stat().st_size > total / 4
    assert peak < 1_000_000 + 4 * largest < total / 3
    assert encoded < 4 * largest

"""A merged folder is what merging in memory gives, bit for bit, or there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from finished import BASE, adapter_in
from models import llama_config, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    StorageError,
    UnsupportedError,
)
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.measuring import measure_merge, measured
from lightning_peft.export.merged_folder import MergedFolder, base_of, merge_into_folder, prepare
from lightning_peft.export.output import atomic_folder

NF4 = engine.quantization_config()
FP4 = engine.quantization_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
INT8 = engine.quantization_config(load_in_8bit=True)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def randomize(model: nn.Module) -> None:
    for layer in engine.adapted_layers(model).values():
        layer.factors("default")[1].data.normal_(0, 0.05)


def saved(tmp_path: Path, build, dtype=torch.float32, **settings) -> tuple[nn.Module, Path]:
    """Returns a model with an adapter, after writing both; the base in shards."""
    build().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    cls = type(build())
    model = cls.from_pretrained(tmp_path / "base")
    lightning_peft.inject(model, **({"r": 4} | settings))
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def merged(adapter: Path, output: Path, base: str | None = None, **options) -> MergedFolder:
    found = find_adapter(str(adapter))
    return merge_into_folder(found, output, base_of(found, base), **options)


def in_memory(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    lightning_peft.merge(model, dtype=dtype)
    lightning_peft.unload(model)
    return {name: value.to(dtype) for name, value in model.state_dict().items()}


KINDS = {
    "llama": (tiny_llama, {}),
    "llama-nf4": (tiny_llama, {"quantization_config": NF4}),
    "llama-fp4": (tiny_llama, {"quantization_config": FP4}),
    "llama-int8": (tiny_llama, {"quantization_config": INT8}),
    "some-layers": (tiny_llama, {"quantization_config": NF4, "target_modules": ["v_proj"]}),
    "saved-in-full": (tiny_llama, {"quantization_config": NF4, "modules_to_save": ["lm_head"]}),
    "rank-stabilised": (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "pissa": (tiny_llama, {"init_lora_weights": "pissa"}),
    "gpt2-tied-nf4": (tiny_gpt2, {"quantization_config": NF4}),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["wide", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_is_merging_in_memory_bit_for_bit(kind: str, stored, tmp_path: Path) -> None:
    build, settings = KINDS[kind]
    if kind == "pissa":
        settings = settings | {"r": 4}
    model, adapter = saved(tmp_path, build, stored, **settings)
    result = merged(adapter, tmp_path / "out")
    written = type(model).from_pretrained(tmp_path / "out")
    expected = in_memory(model, torch.bfloat16)
    assert written.dtype == torch.bfloat16
    found = written.state_dict()
    assert set(found) == set(expected)
    close = kind == "pissa"  # the file is for the base before its initialisation rewrote it
    for name, value in expected.items():
        if close:
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-3)
        else:
            assert torch.equal(found[name], value), name
    assert result.base_checked
    assert result.into == ("dequantized" if "quantization_config" in settings else "original")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in (tmp_path / "base").glob("*.safetensors")
    )


def test_the_original_base_is_an_alternative(tmp_path: Path) -> None:
    _, adapter = saved(tmp_path, tiny_llama, quantization_config=NF4)
    result = merged(adapter, tmp_path / "out", into="original", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lightning_peft.load_adapter(dense, adapter)
    expected = in_memory(dense, torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert result.summary("dequantized")["worst"] == 0
    assert result.summary("original")["median"] > 0.01
    assert result.summary("requantized")["median"] > 0.01


def test_layer_errors_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    model, adapter = saved(tmp_path, tiny_llama, quantization_config=NF4)
    result = merged(adapter, tmp_path / "out", dtype=torch.float16)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    layers = engine.adapted_layers(model)
    assert len(result.weights) == len(layers) == 14
    for found in result.weights:
        layer, name = layers[found.name], f"{found.name}.weight"
        target, delta = layer.effective_weight(), layer.delta_weight("default")
        share = (out[name].float() - target).norm() / delta.norm()
        assert found.dequantized == pytest.approx(share.item(), rel=1e-3)
        original = ((base[name] + delta).half().float() - target).norm() / delta.norm()
        assert found.original == pytest.approx(original.item(), rel=1e-3)


def test_an_adapter_of_plain_peft(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(**token_batch()).logits
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    assert not result.base_checked
    torch.manual_seed(20)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = token_batch()
    torch.testing.assert_close(out(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    assert expected.isfinite().all()
    with pytest.raises(ConfigError, match="does not say that its base was quantized"):
        merged(tmp_path / "adapter", tmp_path / "other", into="dequantized")


def test_a_new_head_comes_from_the_adapter(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model.config.pad_token_id = 0
    lightning_peft.inject(model, r=2)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    out = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = token_batch(1)["input_ids"].clamp(min=1)
    torch.testing.assert_close(out(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_the_trained_function_is_kept(qlora_run: Path, tmp_path: Path) -> None:
    """Half a per cent of the logits is the aim; quantizing again loses far more."""
    adapter = find_adapter(str(qlora_run))
    assert adapter.folder == adapter_in(qlora_run)
    base = find_base(str(BASE))
    result = merge_into_folder(adapter, tmp_path / "out", base)
    found, reason = measured(
        adapter,
        base,
        lambda: measure_merge(adapter, base, result.folder, result.into, torch.bfloat16),
    )
    assert reason is None
    assert found["dequantized"].relative < 0.005
    assert found["dequantized"].same_choice > 0.97
    for way in ("original", "requantized"):
        assert found[way].relative > 5 * found["dequantized"].relative
        assert found[way].kl > 5 * found["dequantized"].kl


# --- memory ------------------------------------------------------------------------------------


def peak_bytes(run) -> int:
    """Returns the largest sum of what torch had allocated on the CPU during ``run()``."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    config = llama_config(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_key_value_heads=4,
    )
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="3MB")
    shard = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = 2 * sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    model = AutoModelForCausalLM.from_pretrained(base)
    lightning_peft.inject(model, r=2, quantization_config=NF4)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    factors = sum(4 * p.numel() for p in engine.adapter_parameters(model).values())
    del model
    peak = peak_bytes(lambda: merged(tmp_path / "adapter", tmp_path / "out"))
    # A shard of the base, which is mapped and not read, a handful of float32 copies of the largest
    # tensor, and the adapter.
    assert peak < shard + 10 * 4 * largest + 4 * factors
    assert peak < total


# --- nothing half ------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    _, adapter = saved(tmp_path, tiny_llama, quantization_config=NF4)
    before = sorted(os.listdir(tmp_path))

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "merging" and done > total / 2:
            assert any(name.startswith(".incomplete-") for name in os.listdir(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(adapter, tmp_path / "out", progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / ".incomplete-1-out").mkdir()
    (tmp_path / "out").mkdir()
    merged(adapter, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [*before, "out"]


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, adapter = saved(tmp_path, tiny_llama)
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"was trained on other weights .*base.*--no-check"):
        merged(adapter, tmp_path / "out", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    result = merged(adapter, tmp_path / "out", base=str(tmp_path / "other"), check_base=False)
    assert not result.base_checked
    wide = tiny_llama(layers=3)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="does not fit"):
        merged(adapter, tmp_path / "wide-out", base=str(tmp_path / "wide"))
    assert engine.record_of(model) is not None


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    targets = ["q_proj", "lm_head"]
    _, adapter = saved(tmp_path, lambda: tiny_llama(tied=True), target_modules=targets)
    with pytest.raises(UnsupportedError, match="lm_head shares its weight with .*embed_tokens"):
        merged(adapter, tmp_path / "out")


def test_tied_weights_that_are_trained_in_full(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lightning_peft.inject(model, r=2, modules_to_save=["embed_tokens", "lm_head"])
    model.lm_head.weight.data += 1
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(out.lm_head.weight, model.lm_head.weight)
    assert out.lm_head.weight is out.model.embed_tokens.weight


@pytest.mark.parametrize("keys", [{EMBEDDING, HEAD}, {HEAD}], ids=["both", "head"])
def test_rows_of_tied_weights_under_the_names_in_the_files(keys: set, tmp_path: Path) -> None:
    file = tmp_path / "base" / "model.safetensors"
    tiny_llama(tied=True).save_pretrained(file.parent)
    tensors = load_file(file)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    written = {k: v for k, v in tensors.items() if k in keys or k not in (EMBEDDING, HEAD)}
    save_file(written, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(file.parent)
    lightning_peft.inject(model, r=2, trainable_token_indices=[3, 7])
    for param in engine.all_adapter_parameters(model):
        param.data.normal_()
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    result = merged(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = in_memory(model, torch.float32)
    assert all(torch.equal(out[name], value) for name, value in expected.items())
    assert [one.name for one in result.weights].count("model.embed_tokens") == 1


def test_an_adapter_whose_weight_no_file_has_is_refused(tmp_path: Path) -> None:
    model, adapter = saved(tmp_path, tiny_llama, target_modules=["q_proj"])
    merge, _ = prepare(find_adapter(str(adapter)), find_base(str(tmp_path / "base")), None, None)
    first, second = (f"model.layers.{index}.self_attn.q_proj" for index in (0, 1))
    merge.merged(f"{first}.weight", torch.zeros(model.get_submodule(first).weight.shape))
    with pytest.raises(CheckpointError, match=rf"no weights for these layers(?s:.*){second}\n"):
        merge.check_complete()


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lightning_peft.inject(model, LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]))
    lightning_peft.save_adapter(model, tmp_path / "wrapped")
    with pytest.raises(UnsupportedError, match="an adapter in PEFT's own layers"):
        merged(tmp_path / "wrapped", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lightning_peft.inject(model, r=2, init_lora_weights="pissa", quantization_config=NF4)
    lightning_peft.save_adapter(model, tmp_path / "pissa")
    with pytest.raises(UnsupportedError, match="the base less the first factors"):
        merged(tmp_path / "pissa", tmp_path / "out")
    assert merged(tmp_path / "pissa", tmp_path / "out", into="original").base_checked


def test_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    def loud() -> nn.Module:
        model = tiny_llama()
        model.model.norm.weight.data[3] = 1e5
        return model

    _, adapter = saved(tmp_path, loud)
    with pytest.raises(CheckpointError, match=r"model.norm.weight .* float16 ends at 65504"):
        merged(adapter, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    merged(adapter, tmp_path / "out")


BROKEN = {
    "cut short": ("model-00001", "not a complete safetensors file"),
    "absent": ("model-00001", "names files that are not there"),
    "pickled": ("model", "Pickled weights"),
    "quantized": ("config", "are quantized already"),
    "unknown": ("config", "not a transformers model that can be read"),
    "moved": ("config", "name where that is now by --base"),
    "adapter cut short": ("config", "adapter_model.safetensors' is not a complete"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_base_that_cannot_be_used(fault: str, tmp_path: Path) -> None:
    _, adapter = saved(tmp_path, tiny_llama)
    base, message = tmp_path / "base", BROKEN[fault][1]
    shard = next(base.glob("model-00001*"))
    config = json.loads((base / "config.json").read_text())
    if fault == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif fault == "absent":
        shard.unlink()
    elif fault == "pickled":
        for file in base.glob("model*"):
            file.unlink()
    elif fault == "quantized":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif fault == "unknown":
        config = {"model_type": "nothing-known"}
    elif fault == "adapter cut short":
        os.truncate(adapter / "adapter_model.safetensors", 1000)
    (base / "config.json").write_text(json.dumps(config))
    if fault == "moved":
        base.rename(tmp_path / "elsewhere")
    with pytest.raises((ConfigError, UnsupportedError, CheckpointError), match=message):
        merged(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    _, adapter = saved(tmp_path, tiny_llama)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        merged(adapter, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be made: Not a directory"):
        merged(adapter, tmp_path / "out" / "mine" / "below")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StorageError, match="the disk is full"), atomic_folder(out):
        Path("/dev/full").write_bytes(b"weights")
    # An error of what is read is its own.
    with pytest.raises(FileNotFoundError), atomic_folder(out):
        (tmp_path / "base").read_bytes()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_base_weight_that_the_adapter_brings_gets_its_adapter_too(tmp_path: Path) -> None:
    """PEFT writes the embedding below an adapter; the outline of the base has no values."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    theirs = get_peft_model(base, config).eval()
    batch = token_batch(rows=1)
    expected = theirs(**batch).logits
    theirs.save_pretrained(tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"), dtype=torch.float32)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_another_frozen_head_is_another_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_llama().config
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    model.score.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    module = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    lightning_peft.inject(module.requires_grad_(False), r=2)
    lightning_peft.save_adapter(module, tmp_path / "adapter")
    assert merged(tmp_path / "adapter", tmp_path / "out").base_checked
    with pytest.raises(BaseMismatchError, match="was trained on other weights"):
        merged(tmp_path / "adapter", tmp_path / "again", str(tmp_path / "other"))

"""Adapter folders are PEFT's own, in both directions, and nothing doubtful is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForSequenceClassification

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    LifecycleError,
)

from .reference import injected, output_of, randomize

NF4 = engine.quantization_config()
BUILDERS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "gpt2": tiny_gpt2,
    "classifier": lambda: LlamaForSequenceClassification(tiny_llama().config).eval(),
    "stack": stack,
}


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILDERS[kind]()


@torch.no_grad()
def train(model: nn.Module) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.add_(torch.randn_like(param) * 0.1)


def batch_for(kind: str) -> object:
    if kind == "stack":
        return torch.randn(3, 96)
    batch = token_batch(rows=1)
    return {"input_ids": batch["input_ids"]} if kind == "classifier" else batch


def test_tied_modules_that_peft_trained_apart_are_refused(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = get_peft_model(build("tied"), config)
    model.save_pretrained(tmp_path / "same")
    lightning_peft.load_adapter(build("tied"), tmp_path / "same")
    train(model)
    model.save_pretrained(tmp_path / "apart")
    with pytest.raises(CheckpointError, match="have different values in the file and are tied"):
        lightning_peft.load_adapter(build("tied"), tmp_path / "apart")


def test_tied_modules_that_are_saved_both_load_here_and_in_peft(tmp_path: Path) -> None:
    model, batch = build("tied"), batch_for("tied")
    lightning_peft.inject(model, r=4, modules_to_save=["lm_head", "embed_tokens"])
    train(model)
    expected = output_of(model, batch)
    lightning_peft.save_adapter(model, tmp_path)
    mine = build("tied")
    lightning_peft.load_adapter(mine, tmp_path)
    assert torch.equal(output_of(mine, batch), expected)
    theirs = PeftModel.from_pretrained(build("tied"), tmp_path).eval()
    torch.testing.assert_close(output_of(theirs, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_module_named_as_an_adapter_in_a_file_is_left_to_the_base(tmp_path: Path) -> None:
    """On loading, PEFT's adapters are called "default", below every layer that they are on."""
    base = nn.ModuleDict({"a": nn.Linear(4, 4), "default": nn.Linear(4, 4)})
    config = LoraConfig(target_modules=["a"], modules_to_save=["default"], use_dora=True)
    lightning_peft.inject(base, config, adapter_name="mine")
    lightning_peft.save_adapter(base, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["modules_to_save"] is None


def saved(tmp_path: Path, kind: str = "llama", **settings) -> tuple[nn.Module, Path]:
    model = injected(build(kind), **({"r": 4} | settings))
    randomize(model)
    return model, lightning_peft.save_adapter(model, tmp_path / "adapter")


def test_a_quantized_base_trains_an_adapter_for_the_dense_one(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, quantization_config=NF4)
    dense = build("llama")
    lightning_peft.load_adapter(dense, folder)
    values = engine.adapter_parameters(model)
    assert all(torch.equal(p, values[n]) for n, p in engine.adapter_parameters(dense).items())
    assert json.loads((folder / "provenance.json").read_text())["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": None,
    }


def test_the_files_say_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    model = injected(build("llama"), r=4)
    folder = lightning_peft.save_adapter(
        model, tmp_path / "deep" / "folder", provenance={"step": 3, "data": {"b", "a"}}
    )
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    ]
    facts = json.loads((folder / "provenance.json").read_text())
    blob = (folder / "adapter_model.safetensors").read_bytes()
    assert facts["adapter_sha256"] == hashlib.sha256(blob).hexdigest()
    entry = engine.require_record(model).parts[""]
    assert facts["base"]["fingerprint"] == entry.base.digest()
    assert (facts["seed"], facts["step"], facts["data"]) == (17, 3, ["a", "b"])
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["config"]["r"] == 4
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    assert config["inference_mode"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_whose_initialisation_rewrote_the_base_is_saved_for_the_plain_one(
    use_rslora: bool, tmp_path: Path
) -> None:
    """Any program that computes ``W + s B A`` from the files gets the trained model."""
    model = build("stack")
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    lightning_peft.inject(model, r=4, init_lora_weights="pissa", use_rslora=use_rslora)
    assert not torch.allclose(model.first._parameters["weight"], plain["first.weight"], atol=1e-3)
    train(model)
    lightning_peft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if use_rslora else config["r"])
    lightning_peft.merge(model)
    for name in ("first", "second"):
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        applied = plain[f"{name}.weight"] + scaling * (b @ a)
        torch.testing.assert_close(applied, model.get_submodule(name).weight, rtol=1e-4, atol=1e-5)


def test_a_conv1d_adapter_says_so(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "gpt2")
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_nothing_unfinished_is_left_and_files_are_replaced_whole(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    first = (folder / "adapter_model.safetensors").read_bytes()
    randomize(model)
    lightning_peft.save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert len(list(folder.iterdir())) == 3


# --- strict ------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    (folder / "provenance.json").unlink()


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    prefix = "base_model.model.model.layers.0.self_attn"

    def change(tensors: dict) -> dict:
        del tensors[f"{prefix}.q_proj.lora_A.weight"]
        tensors[f"{prefix}.x_proj.lora_A.weight"] = torch.zeros(1)
        tensors[f"{prefix}.k_proj.lora_B.weight"] = torch.zeros(3, 4)
        return tensors

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        lightning_peft.load_adapter(build("llama"), folder)
    message = str(caught.value)
    assert "missing: model.layers.0.self_attn.q_proj.lora_A.weight" in message
    assert "unexpected: model.layers.0.self_attn.x_proj.lora_A.weight" in message
    assert "k_proj.lora_B.weight: (3, 4) in the file, (32, 4) in the module" in message


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    trap = folder / "adapter_model.bin"
    trap.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"only 'adapter_model.bin', which is a pickle"):
        lightning_peft.load_adapter(build("llama"), folder)
    # Under another name it is not a safetensors file, and is not executed either.
    shutil.move(trap, weights)
    (folder / "provenance.json").unlink()
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        lightning_peft.load_adapter(build("llama"), folder)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            lightning_peft.load_adapter(build("llama"), folder)


def test_weights_that_were_exchanged_are_noticed(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    randomize(model)
    other = lightning_peft.save_adapter(model, tmp_path / "other")
    shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="its sha256 is another one"):
        lightning_peft.load_adapter(build("llama"), folder)


def test_a_damaged_provenance_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    (folder / "provenance.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"provenance.json.*cannot be read as JSON"):
        lightning_peft.load_adapter(build("llama"), folder)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json(.|\n)*ckpt_path"):
        lightning_peft.load_adapter(build("llama"), tmp_path)


def test_another_base_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    other = build("llama", seed=1)
    with pytest.raises(BaseMismatchError, match="was trained on another base"):
        lightning_peft.load_adapter(other, folder)
    model = build("llama", seed=1)
    lightning_peft.load_adapter(model, folder, check_base=False)
    assert engine.require_record(model).active == ("default",)


def test_files_of_plain_peft_record_no_base(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    (folder / "provenance.json").unlink()
    lightning_peft.load_adapter(build("llama", seed=1), folder)


def test_the_same_weights_in_another_dtype_are_the_same_base(tmp_path: Path) -> None:
    model = injected(build("llama").to(torch.bfloat16), r=4)
    folder = lightning_peft.save_adapter(model, tmp_path)
    lightning_peft.load_adapter(build("llama").to(torch.bfloat16).float(), folder)


# --- several adapters and several parts ---------------------------------------------------------


def test_several_adapters_on_one_base(tmp_path: Path) -> None:
    x, expected = batch_for("llama"), {}
    for name, r in (("a", 4), ("b", 2)):
        model = injected(build("llama"), r=r)
        randomize(model)
        expected[name] = output_of(model, x)
        lightning_peft.save_adapter(model, tmp_path / name)
    model = build("llama")
    base = output_of(model, x)
    lightning_peft.load_adapter(model, tmp_path / "a", adapter_name="a")
    assert torch.equal(output_of(model, x), expected["a"])
    lightning_peft.load_adapter(model, tmp_path / "b", adapter_name="b")
    assert torch.equal(output_of(model, x), expected["b"])
    lightning_peft.set_adapter(model, "a")
    assert torch.equal(output_of(model, x), expected["a"])
    lightning_peft.set_adapter(model, ["a", "b"])
    combined = output_of(model, x)
    assert not any(torch.equal(combined, value) for value in (base, *expected.values()))
    with pytest.raises(ConfigError, match=r"Several adapters are active \(a, b\)"):
        lightning_peft.save_adapter(model, tmp_path / "c")
    for name in ("a", "b"):
        again = lightning_peft.save_adapter(model, tmp_path / "again" / name, adapter_name=name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (again / file).read_bytes() == (tmp_path / name / file).read_bytes()
    with pytest.raises(ConfigError, match="adapter_name='c': this module's adapters are a, b"):
        lightning_peft.save_adapter(model, tmp_path / "c", adapter_name="c")


def test_all_adapters_in_one_folder_as_peft_lays_them_out(tmp_path: Path) -> None:
    model = injected(build("llama"), r=4)
    lightning_peft.inject(model, r=2, adapter_name="second")
    randomize(model)
    files = engine.packed_adapters(model, {"step": 1})
    assert sorted({Path(name).parent.as_posix() for name in files}) == [".", "second"]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    theirs = PeftModel.from_pretrained(build("llama"), tmp_path)
    theirs.load_adapter(tmp_path / "second", adapter_name="second")
    theirs.set_adapter("second")
    lightning_peft.set_adapter(model, "second")
    x = batch_for("llama")
    torch.testing.assert_close(output_of(theirs.eval(), x), output_of(model, x))


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = tiny_llama(layers=1)
        self.inner = nn.ModuleDict({"stack": stack()})


def two_parts() -> nn.Module:
    torch.manual_seed(0)
    return TwoParts().eval()


def test_several_parts_get_a_folder_each(tmp_path: Path) -> None:
    model, batch, x = two_parts(), batch_for("llama"), torch.randn(3, 96)
    lightning_peft.inject(
        model,
        r=4,
        adapt=["text", "inner.stack"],
        target_modules=["q_proj", "first"],
        rank_pattern={"first": 2},
    )
    train(model)
    lightning_peft.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner.stack", "text"]
    fresh = two_parts()
    lightning_peft.load_adapter(fresh, tmp_path)
    assert torch.equal(output_of(fresh.text, batch), output_of(model.text, batch))
    assert torch.equal(fresh.inner["stack"](x), model.inner["stack"](x))
    # One of them, by its name and by its own folder.
    for path, adapt in ((tmp_path, "text"), (tmp_path / "text", "text")):
        fresh = two_parts()
        lightning_peft.load_adapter(fresh, path, adapt=adapt)
        assert torch.equal(output_of(fresh.text, batch), output_of(model.text, batch))
        assert engine.require_record(fresh).parts.keys() == {"text"}
    with pytest.raises(CheckpointError, match=r"'inner.stack', 'text' and none for adapt='x'"):
        lightning_peft.load_adapter(two_parts(), tmp_path, adapt="x")
    # The folder of one part is an adapter for that model alone, in PEFT too.
    theirs = PeftModel.from_pretrained(two_parts().text, tmp_path / "text").eval()
    torch.testing.assert_close(output_of(theirs, batch), output_of(model.text, batch))
    # What was loaded part by part can be described and restored.
    fresh = two_parts()
    lightning_peft.load_adapter(fresh, tmp_path)
    again = two_parts()
    engine.inject_as_described(again, engine.describe(fresh))
    engine.load_trainable_state_dict(again, engine.trainable_state_dict(fresh))
    assert torch.equal(again.inner["stack"](x), model.inner["stack"](x))


def test_several_adapters_of_several_parts_do_not_mix(tmp_path: Path) -> None:
    model = injected(two_parts(), r=4, adapt=["text", "inner.stack"], adapter_name="a")
    lightning_peft.inject(model, r=4, adapt="text", adapter_name="b")
    files = engine.packed_adapters(model, {})
    folders = {Path(name).parent.as_posix() for name in files}
    assert folders == {"a/text", "a/inner.stack", "b"}


def test_one_adapter_for_one_of_several_parts_needs_its_name(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "stack")

    class TwoModels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = tiny_llama(layers=1), tiny_llama(layers=1)

    with pytest.raises(ConfigError, match=r"several parts to put it on \('a', 'b'\)"):
        lightning_peft.load_adapter(TwoModels(), folder)


def test_a_part_of_a_larger_module_gives_files_for_the_part(tmp_path: Path) -> None:
    model = injected(nn.ModuleDict({"model": build("llama")}), r=4)
    randomize(model)
    folder = lightning_peft.save_adapter(model, tmp_path)
    bare, batch = build("llama"), batch_for("llama")
    lightning_peft.load_adapter(bare, folder)
    assert torch.equal(output_of(bare, batch), output_of(model["model"], batch))


# --- trainable or not ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_loaded_adapter_trains_only_when_asked(settings: dict, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, **settings)
    resting, training = build("llama"), build("llama")
    lightning_peft.load_adapter(resting, folder)
    assert not any(param.requires_grad for param in resting.parameters())
    lightning_peft.load_adapter(training, folder, is_trainable=True)
    entry = engine.require_record(training).parts[""]
    assert {id(p) for p in training.parameters() if p.requires_grad} == {
        id(p) for p in engine.trained_parameters(training, entry).values()
    }


def test_an_adapter_is_not_loaded_over_merged_weights(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    lightning_peft.merge(model)
    with pytest.raises(LifecycleError, match="unmerge"):
        lightning_peft.load_adapter(model, folder, adapter_name="other")

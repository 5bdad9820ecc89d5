"""``save_pretrained`` of models with adapters writes these, as PEFT's and transformers' own do."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
)

import lightning_peft
from lightning_peft.errors import ConfigError, LifecycleError

from .reference import injected, output_of, randomize

LORA = LoraConfig(r=2, target_modules=["q_proj"])
FILE = "adapter_model.safetensors"
REFUSED = r"lightning_peft.save_adapter\(module, folder\)"


def adapted(by_peft: bool = False, llama: Any = None) -> Any:
    llama = llama or tiny_llama()
    module = injected(nn.Sequential(get_peft_model(llama, LORA) if by_peft else llama), LORA)
    randomize(module)
    return module


def same(one: Path, other: Path) -> bool:
    first, second = load_file(one / FILE), load_file(other / FILE)
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).parent) for path in folder.rglob(FILE))


@pytest.mark.parametrize("by_peft", [False, True])
def test_the_folder_is_that_of_save_adapter(by_peft: bool, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    base = tiny_llama()
    module = adapted(by_peft, copy.deepcopy(base))
    module[0].save_pretrained(tmp_path / "mine", safe_serialization=True, max_shard_size="1GB")
    lightning_peft.save_adapter(module, tmp_path / "expected")
    assert same(tmp_path / "mine", tmp_path / "expected")
    assert "written to" in caplog.text
    assert "outside of its adapted parts" not in caplog.text
    batch = token_batch()
    theirs = PeftModel.from_pretrained(base, tmp_path / "mine")
    torch.testing.assert_close(output_of(theirs, batch), output_of(module[0], batch))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("whole", [True, False])
def test_a_copy_writes_its_own_values(copied: Any, whole: bool, tmp_path: Path) -> None:
    module = adapted()
    other = copied(module)[0] if whole else copied(module[0])
    for param in other.parameters():
        param.data += 1
    for name, model in {"module": module[0], "other": other}.items():
        model.save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / FILE) for name in ("module", "other"))
    assert all(torch.equal(second[name], value + 1) for name, value in first.items())
    del module
    other.save_pretrained(tmp_path / "again")
    assert same(tmp_path / "again", tmp_path / "other")


def test_arguments_have_the_order_of_the_library(tmp_path: Path) -> None:
    model, wrapper = adapted()[0], adapted(by_peft=True)[0]
    model.save_pretrained(tmp_path, False)
    wrapper.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    # Of transformers `is_main_process`, of PEFT `safe_serialization`.
    wrapper.save_pretrained(tmp_path, False)
    assert written(tmp_path) == ["."]


@pytest.mark.parametrize("by_peft", [False, True])
def test_nothing_is_written_of_merged_adapters_or_given_values(
    by_peft: bool, tmp_path: Path
) -> None:
    module = adapted(by_peft)
    with pytest.raises(LifecycleError, match=REFUSED):
        module[0].save_pretrained(tmp_path / "lost", state_dict=module[0].state_dict())
    batch = token_batch()
    expected = output_of(module[0], batch)
    lightning_peft.merge(module)
    with pytest.raises(LifecycleError, match=REFUSED):
        module[0].save_pretrained(tmp_path / "lost")
    lightning_peft.unload(module)
    assert not any("save_pretrained" in vars(child) for child in module.modules())
    llama = module[0].base_model.model if by_peft else module[0]
    llama.save_pretrained(tmp_path / "whole")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(output_of(loaded, batch), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("by_peft", [False, True])
def test_several_adapters(by_peft: bool, tmp_path: Path) -> None:
    module = adapted(by_peft)
    lightning_peft.inject(module, LORA, adapter_name="other")
    module[0].save_pretrained(tmp_path / "all")
    assert written(tmp_path / "all") == [".", "other"]
    if by_peft:
        module[0].save_pretrained(tmp_path / "one", selected_adapters=["other"])
        assert written(tmp_path / "one") == ["other"]
        with pytest.raises(ConfigError, match=r"selected_adapters=\['x'\].* default, other"):
            module[0].save_pretrained(tmp_path / "none", selected_adapters=["x"])


def captioner() -> Any:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = ViTModel(ViTConfig(**size, intermediate_size=32, image_size=8, patch_size=4))
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=16, add_cross_attention=True)
    return VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(config))


def test_models_around_adapted_parts(tmp_path: Path, caplog) -> None:
    module = injected(nn.Sequential(captioner()), r=2, adapt="0.encoder")
    module[0].save_pretrained(tmp_path / "one")
    assert written(tmp_path / "one") == ["."]
    assert "VisionEncoderDecoderModel has " in caplog.text
    assert "outside of its adapted parts (decoder.transformer.wte.weight, " in caplog.text
    module = injected(nn.Sequential(captioner()), r=2, adapt=["0.encoder", "0.decoder"])
    module[0].save_pretrained(tmp_path / "two")
    assert written(tmp_path / "two") == ["decoder", "encoder"]
    module[0].decoder.save_pretrained(tmp_path / "decoder")
    assert same(tmp_path / "decoder", tmp_path / "two" / "decoder")


def test_models_inside_of_an_adapted_part(tmp_path: Path) -> None:
    model = injected(captioner(), r=2, target_modules=["c_attn"], adapt="")
    with pytest.raises(LifecycleError, match=REFUSED):
        model.decoder.save_pretrained(tmp_path / "decoder")
    # Which has no adapters.
    model.encoder.save_pretrained(tmp_path / "encoder")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    ViTModel.from_pretrained(tmp_path / "encoder")


class Own(LlamaForCausalLM):
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError


def test_what_is_not_done_is_said(tmp_path: Path, caplog) -> None:
    model = injected(Own(tiny_llama().config), LORA)
    model.save_pretrained(tmp_path / "own", push_to_hub=True)
    assert written(tmp_path) == ["own"]
    assert "save_pretrained of Own itself is not called" in caplog.text
    assert "push_to_hub=True: nothing was uploaded" in caplog.text


def test_a_merged_base_that_was_quantized_before_is_saved_dense(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four).eval()
    randomize(injected(model, LORA))
    lightning_peft.merge(model)
    lightning_peft.unload(model)
    model.save_pretrained(tmp_path / "merged")
    read = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=model.dtype).eval()
    assert not hasattr(read.config, "quantization_config")
    batch = token_batch()
    assert output_of(read, batch).equal(output_of(model, batch))

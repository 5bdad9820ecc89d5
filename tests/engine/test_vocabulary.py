"""Vocabularies that were changed after the base was loaded: recorded, saved, restored, refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import llama_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lightning_peft
from lightning_peft.engine.files.description import describe, inject_as_described
from lightning_peft.engine.record import record_of
from lightning_peft.errors import CheckpointError
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.merged_folder import base_of, merge_into_folder

from .reference import injected

CONFIG = llama_config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
IDS = torch.tensor([[1, 3, 65, 64]])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    """The folder of a base with 64 tokens."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG)
    config.tie_word_embeddings = request.param
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def trained(base, tmp_path):
    """A model with 66 tokens and an adapter, and the folder of the adapter."""
    model = loaded(base)
    model.resize_token_embeddings(66, mean_resizing=False)
    lightning_peft.inject(model, r=4, init_lora_weights=False)
    return model, lightning_peft.save_adapter(model, tmp_path / "adapter")


def test_new_rows_come_back_with_the_adapter(base, trained):
    model, folder = trained
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["base"]["vocabulary"] == 66
    other = loaded(base)
    lightning_peft.load_adapter(other, folder)
    assert other.config.vocab_size == 66
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits)
    # PEFT leaves the resizing to its user.
    theirs = loaded(base)
    theirs.resize_token_embeddings(66, mean_resizing=False)
    theirs = PeftModel.from_pretrained(theirs, str(folder))
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_a_checkpoint_restores_the_size(base, trained):
    model, _ = trained
    other = loaded(base)
    inject_as_described(other, describe(model))
    assert other.get_input_embeddings().weight.shape[0] == 66


def test_a_module_of_another_size_is_named(base, trained):
    model, _ = trained
    other = injected(loaded(base), r=4)
    words = r"vocabulary 64 in the base, 66 in the run: call model.resize_token_embeddings\(66\)"
    with pytest.raises(CheckpointError, match=words):
        lightning_peft.engine.check_description(other, describe(model))


def test_merging_writes_the_size_of_the_run(base, trained, tmp_path):
    model, folder = trained
    for check in (True, False):
        adapter = find_adapter(str(folder))
        output = tmp_path / f"merged {check}"
        merge_into_folder(adapter, output, base_of(adapter), check_base=check, dtype=torch.float32)
        merged = AutoModelForCausalLM.from_pretrained(output)
        assert merged.config.vocab_size == 66
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_rows_that_no_file_holds_are_refused(base, trained, tmp_path):
    _, folder = trained
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora_" in k}, file)
    facts = json.loads((folder / "provenance.json").read_text())
    del facts["adapter_sha256"]
    (folder / "provenance.json").write_text(json.dumps(facts))
    other = loaded(base)
    words = "vocabulary 64 in the base, 66 in the run: call model.resize_token_embeddings"
    with pytest.raises(CheckpointError, match=words):
        lightning_peft.load_adapter(other, folder)
    assert record_of(other) is None
    assert other.config.vocab_size == 64
    adapter = find_adapter(str(folder))
    with pytest.raises(CheckpointError, match=words):
        merge_into_folder(adapter, tmp_path / "out", base_of(adapter), check_base=False)
    assert not (tmp_path / "out").exists()


def test_a_refused_load_puts_the_size_back(base, trained):
    _, folder = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    config["r"] = 8
    (folder / "adapter_config.json").write_text(json.dumps(config))
    other = loaded(base)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        lightning_peft.load_adapter(other, folder)
    assert other.config.vocab_size == 64
    torch.testing.assert_close(dict(other.state_dict()), before)


def test_a_vocabulary_that_is_as_it_was_loaded_is_not_saved(base, tmp_path):
    model = injected(loaded(base), r=4)
    folder = lightning_peft.save_adapter(model, tmp_path / "adapter")
    assert not [k for k in load_file(folder / "adapter_model.safetensors") if "embed" in k]

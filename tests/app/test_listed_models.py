"""The models that the form lists: facts, sizes, and plans before a download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gradio_app.pages.new.data_check import unavailable_model
from gradio_app.pages.new.model import _model_label
from gradio_app.recipe import edits, presets
from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import base_recipe, with_model
from gradio_app.recipe.model_files import free_bytes, is_cached
from gradio_app.recipe.planner import plan_arguments, planned_place
from gradio_app.recipe.presets import MODELS
from gradio_app.runs.machine import Machine
from gradio_app.texts import Texts
from lightning_peft.plan.prediction import predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import from_name
from lightning_peft.runs.status import write_json
from lightning_peft.task_registry import TASKS
from lightning_peft.tasks.token_loss import chunked_loss

CHAT = [one for one in MODELS if "causal-lm" in one.families and ":" not in one.name]


def test_models_are_reported_once_and_each_task_knows_its_own():
    names = [model.name for model in MODELS]
    assert len(set(names)) == len(names)
    families = {task.family for task in TASKS.values()}
    assert all(set(model.families) <= families for model in MODELS)
    assert edits.METHODS.keys() == {"lora", "qlora"}


def test_the_list_says_what_cannot_be_fetched_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (model,) = [one for one in MODELS if one.name == "Qwen/Qwen3-0.6B"]
    for gpu, kind in ((None, "cpu"), ("NVIDIA", "gpu")):
        machine = Machine(gpu, 24 * 10**9, 64 * 10**9, 32 * 10**9, 16)
        monkeypatch.setattr(presets, "this_machine", lambda found=machine: found)
        lora, qlora = model.memory
        assert [lora, qlora] == presets.memory_needs()[model.name][kind]
    row = "Qwen/Qwen3-0.6B: 596 M parameters, Apache 2.0, "
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = "not on this machine, and the page is offline"
    assert _model_label(model, Texts("en")) == f"\u2717 {row}{said}"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    row += f"from {lora:.1f} GB memory with LoRA, {qlora:.1f} GB with QLoRA, download 1.5 GB"
    assert _model_label(model, Texts("en")) == row
    (model,) = [one for one in MODELS if one.name == "google/gemma-3-270m-it"]
    assert ", Gemma, gated, from " in _model_label(model, Texts("en"))


@pytest.mark.long
@pytest.mark.parametrize("model", CHAT, ids=lambda model: model.title)
def test_the_memory_in_the_list_is_the_planners(model):
    source = replace(from_name(str(model.shape)), step=chunked_loss)
    for kind, device in (("gpu", "cuda"), ("cpu", "cpu")):
        given = {"precision": "bf16-mixed", "device": device}
        given |= {"gradient_checkpointing": True, "lora": {"r": 16}}
        plans = [predict(source, PlanSettings(method=one, **given)) for one in ("lora", "qlora")]
        found = [plan.peak_bytes / 1e9 for plan in plans]
        assert presets.memory_needs()[model.name][kind] == pytest.approx(found, rel=0.05)


def test_downloads_are_as_large_as_the_files_on_the_hub():
    sizes = {model.name: model.download_bytes for model in MODELS}
    # With the head, which is the embedding, a second time.
    assert sizes["Qwen/Qwen3-0.6B"] == 1_503_264_768
    # Kept in 32 bits there.
    assert sizes["google-t5/t5-small"] == 242_026_496
    assert free_bytes() > 0


@pytest.mark.parametrize("model", CHAT, ids=lambda model: model.title)
def test_shapes_have_as_many_parameters_as_the_list_says(model):
    config = AutoConfig.from_pretrained(model.shape)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    made.tie_weights()
    assert sum(one.numel() for one in made.parameters()) == model.parameters


def test_listed_models_are_planned_before_their_download(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    content = with_model(base_recipe("sft"), "Qwen/Qwen3-4B", None)
    words = plan_arguments(content, "this", 64)
    assert f"--model={planned_place('Qwen/Qwen3-4B')}" in words
    assert planned_place("Qwen/Qwen3-4B").joinpath("config.json").is_file()
    assert planned_place("me/mine") == Path("me/mine")
    # A look at data fetches the tokenizer alone.
    folder = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    write_json(folder / "tokenizer.json", {})
    assert is_cached("Qwen/Qwen3-4B", weights=False)
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    for name, made in {"model.safetensors.index.json": index, "1.safetensors": {}}.items():
        assert not is_cached("Qwen/Qwen3-4B")
        write_json(folder / name, made)
    assert planned_place("Qwen/Qwen3-4B") != Path("Qwen/Qwen3-4B")
    # What was fetched says itself how large it is.
    write_json(folder / "2.safetensors", {})
    assert is_cached("Qwen/Qwen3-4B")
    assert planned_place("Qwen/Qwen3-4B") == Path("Qwen/Qwen3-4B")


def test_a_tokenizer_of_its_own_needs_no_weights_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, file in (("model", "model.safetensors"), ("words", "tokenizer.json")):
        folder = tmp_path / f"models--a--{name}" / "snapshots" / "main"
        folder.mkdir(parents=True)
        write_json(folder / file, {})
    content = with_model(base_recipe("sft"), "a/model", None)
    content = with_value(content, "data.init_args.tokenizer", "a/words")
    assert unavailable_model(content) == ""
    assert unavailable_model(with_model(content, "a/words", None)) == "a/words"

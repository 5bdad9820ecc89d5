"""The code of a card is run, and gives the model that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_models import VOCABULARY, write_gguf
from models import llama_config, tiny_llama, token_batch
from safetensors.torch import save_file
from toy_backend import TOY
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import CheckpointError
from lightning_peft.export.adapters import Adapter, find_adapter
from lightning_peft.export.base import Base
from lightning_peft.export.card import adapter_card
from lightning_peft.export.formats import ExportRequest, as_adapter, as_vllm
from lightning_peft.export.loading_code import (
    adapter_code,
    labels_of,
    merged_model_code,
    model_class,
)


def randomize(model: torch.nn.Module) -> None:
    for layer in engine.adapted_layers(model).values():
        layer.factors("default")[1].data.normal_(0, 0.05)


def tiny_vit(folder: Path) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=7,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    # Its head is for other labels than those of the pretrained one.
    return ViTForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )


def tiny_classifier(cls, labels):
    def build(folder: Path) -> torch.nn.Module:
        tiny_llama().save_pretrained(folder)
        model = cls.from_pretrained(folder, num_labels=labels)
        model.config.pad_token_id = 0
        return model

    return build


def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": token_batch(1)["input_ids"].clamp(min=1)}


CASES = {
    "sequences": (tiny_classifier(LlamaForSequenceClassification, 3), ids),
    # A reward model.
    "one label": (tiny_classifier(LlamaForSequenceClassification, 1), ids),
    "tokens": (tiny_classifier(LlamaForTokenClassification, 4), ids),
    "pictures": (tiny_vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}),
}


def run(code: str, replaced: dict[str, Path]) -> torch.nn.Module:
    for name, place in replaced.items():
        assert repr(name) in code
        code = code.replace(repr(name), repr(str(place)))
    # The bases here have no tokenizer and no processor.
    lines = [line for line in code.splitlines() if "AutoTokenizer.from" not in line]
    found: dict[str, object] = {}
    exec("\n".join(line for line in lines if "Processor.from" not in line), found)
    return found["model"]


@pytest.mark.parametrize("case", CASES)
def test_the_code_of_a_card_loads_what_was_trained(case, tmp_path):
    build, inputs = CASES[case]
    model = build(tmp_path / "base")
    lightning_peft.inject(model, r=2)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    adapter = find_adapter(str(tmp_path / "adapter"))
    card = adapter_card(adapter, None)
    code = card.partition("```python\n")[2].partition("```")[0]
    places = {"base": tmp_path / "base", "PATH_OR_NAME_OF_THIS_FOLDER": tmp_path / "adapter"}
    loaded = run(code, places)
    loaded.config.pad_token_id = 0
    batch = inputs()
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_what_has_no_auto_class_is_named_and_what_reads_the_inputs_too():
    whisper = {
        "base": {"class": "WhisperForConditionalGeneration"},
        "data": {"class": "lightning_peft.data.speech.SpeechData"},
    }
    code = merged_model_code(whisper, "mine")
    assert "WhisperForConditionalGeneration.from_pretrained('mine')" in code
    assert "processor = AutoProcessor.from_pretrained('mine')" in code
    series = {
        "base": {"class": "PatchTSTForPrediction"},
        "data": {"class": "lightning_peft.data.series.SeriesData"},
    }
    assert "Auto" not in adapter_code(series, "mine", "base", "abc", None)
    assert "revision='abc'" in adapter_code(series, "mine", "base", "abc", None)
    # A class is not taken at its word: the file is somebody's.
    assert model_class({"base": {"class": "os; import x"}}) == "AutoModel"
    assert labels_of(Path("nowhere")) is None


def test_the_head_of_a_roberta_counts_its_labels(tmp_path):
    weights = {"base_model.model.classifier.out_proj.weight": torch.zeros(5, 8)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    assert labels_of(tmp_path) == 5


def test_formats_ask_the_backend_what_the_base_was(tmp_path):
    assert TOY.vllm_quantization is None
    settings = {
        "QLoRA (toy int8, 127 levels)": {"quant_method": TOY.name, "levels": 127},
        "QLoRA (fp4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "QLoRA (int8)": {"load_in_8bit": True},
        "LoRA": None,
    }
    commands = {}
    request = ExportRequest(
        Adapter("mine", tmp_path, {}, {}), Base("base", tmp_path, None), tmp_path / "none", None, {}
    )
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors"):
        as_adapter(request)
    assert not request.output.exists()
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for method, fields in settings.items():
        adapter = Adapter("mine", tmp_path / "adapter", {"r": 8}, {"quantization": fields})
        assert f"{method} of rank 8, trained on" in adapter_card(adapter, None)
        out = tmp_path / method
        request = ExportRequest(adapter, Base("base", tmp_path, None), out, "base", {})
        commands[method] = as_vllm(request)["commands"][1:]
    (fp4,) = commands.pop("QLoRA (fp4)")
    assert fp4.endswith("--quantization bitsandbytes")
    assert not any(commands.values())


def test_code_does_not_give_transformers_a_config_of_another_backend():
    facts = {"quantization": {"quant_method": "toy_int8", "levels": 127}}
    code = adapter_code(facts, "adapter", "base", None, None)
    assert "BitsAndBytesConfig" not in code
    assert "quantized by toy_int8, which this does not do" in code


@pytest.mark.parametrize(
    ("base", "place", "front"),
    [
        ("org/m-GGUF:m.Q8_0.gguf", "'org/m-GGUF', gguf_file='m.Q8_0.gguf'", "org/m-GGUF"),
        ("/home/me/models/m.Q8_0.gguf", "'.', gguf_file='m.Q8_0.gguf'", None),
    ],
)
def test_code_for_a_base_in_a_gguf_file(tmp_path: Path, base: str, place: str, front: str | None):
    facts = {"base": {"name_or_path": base, "class": "LlamaForCausalLM"}}
    card = adapter_card(Adapter("mine", tmp_path, {}, facts), None)
    assert f"base = AutoModelForCausalLM.from_pretrained({place}, quantization_config=" in card
    assert f"tokenizer = AutoTokenizer.from_pretrained({place})" in card
    assert "settings = GgufConfig(dequantize=True)" in card
    assert "home" not in card
    assert (f"base_model: {front}" in card) == (front is not None)


def test_the_code_for_a_gguf_file_loads_what_was_trained(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = llama_config(vocab_size=VOCABULARY, head_dim=16)
    model = LlamaForCausalLM(config).eval()
    file = write_gguf(tmp_path / "m.gguf", model)
    base = engine.load_pretrained_model(AutoModelForCausalLM, file)
    engine.inject(base, r=4)
    randomize(base)
    folder = engine.save_adapter(base, tmp_path / "adapter")
    batch = torch.arange(5, 25)[None]
    expected = base(batch).logits
    found = find_adapter(str(folder))
    code = adapter_code(found.facts, str(folder), str(file), None, None)
    made: dict = {}
    exec(code, made)
    assert torch.allclose(made["model"](batch).logits, expected, atol=1e-5)
    assert made["tokenizer"]("the")["input_ids"]

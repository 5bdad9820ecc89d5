"""Adapters that were merged over a quantized base in training, in what comes after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lightning_peft
from lightning_peft import engine
from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.errors import UnsupportedError, first_line
from lightning_peft.export import loading
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.base import find_base
from lightning_peft.export.card import adapter_card
from lightning_peft.export.formats import as_vllm
from lightning_peft.export.loading import load_with_adapters
from lightning_peft.export.merging import merge
from lightning_peft.export.request import ExportRequest

from .tiny_gguf import byte_tokenizer, tiny_model

IDS = torch.arange(3, 27).view(2, 12)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("targets", "dense"),
    [("all-linear", 7), pytest.param(["q_proj"], 1, marks=pytest.mark.long)],
)
def test_layers_that_the_folder_has_weights_of_are_dense(targets, dense, tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    byte_tokenizer(ascii_only=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    nf4 = engine.quantization_config()
    lightning_peft.inject(model, r=2, target_modules=targets, quantization_config=nf4)
    for _ in range(2):
        for tensor in engine.all_adapter_parameters(model):
            tensor.data.add_(torch.randn_like(tensor), alpha=0.05)
        engine.merge_and_restart(model, 3)
    lightning_peft.save_adapter(model, tmp_path / "adapter")
    expected = model(IDS).logits
    adapter, base = find_adapter(str(tmp_path / "adapter")), find_base(str(tmp_path / "base"))
    loaded = load_with_adapters(base, [adapter], device=CPU)
    (entry,) = engine.require_record(loaded.model).parts.values()
    assert len(entry.quantized) == 7 - dense
    nf4.llm_int8_skip_modules = ["o_proj"]
    with loading._quantized_on_load(nf4, torch.device("cuda"), [adapter]) as on_load:
        assert {*on_load.dense} == {"o_proj", *adapter.merged_layers}
    assert loaded.notes == [
        f"adapter was merged into {dense} layers in training, whose weights are in its folder: "
        "these layers are dense here"
    ]
    ChatModel(loaded, [adapter], "plain")
    torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    report = merge(adapter, tmp_path / "out", dtype="float32", prompts=["one"])
    assert report["not_measured"] is None
    assert report["logit_errors"]["dequantized"]["relative"] < 1e-5
    assert (report["logit_errors"]["original"]["relative"] < 1e-5) == (dense == 7)
    assert "requantized" not in report["logit_errors"]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(written(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    card = adapter_card(adapter, None)
    assert "quantization_config" not in card
    assert "the folder has weights of a dense base" in card
    with pytest.raises(UnsupportedError, match="weights that adapters were merged into, and vLLM"):
        as_vllm(ExportRequest(adapter, base, tmp_path / "vllm", None, {}))


def test_a_line_that_ends_in_a_colon_has_what_follows() -> None:
    assert first_line(ValueError("does not fit:\n  - one\n  - two")) == "does not fit: one"
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"

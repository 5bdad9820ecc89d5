"""The class of a base that has one for text alone and one that sees: the adapter's weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finished import BASE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3_5Config,
)

from lightning_peft.chat.images import find_images
from lightning_peft.export.adapters import find_adapters
from lightning_peft.export.base import find_base
from lightning_peft.export.loading import class_name, load_with_adapters

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2}
VISION |= {"out_hidden_size": 32}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = Qwen3_5Config(text_config={**TEXT, "vocab_size": len(tokenizer)}, vision_config=VISION)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize(
    ("auto", "name", "key"),
    [
        (AutoModelForCausalLM, "Qwen3_5ForCausalLM", "model.layers.0."),
        (AutoModelForImageTextToText, "Qwen3_5ForConditionalGeneration", "language_model.layers"),
    ],
)
def test_an_adapter_written_by_peft_gets_the_class_that_it_was_trained_on(
    auto: Any, name: str, key: str, task_type: str | None, base: Path, tmp_path: Path
) -> None:
    tuned = peft.get_peft_model(
        auto.from_pretrained(base),
        peft.LoraConfig(
            r=2, target_modules=["q_proj"], task_type=task_type, init_lora_weights=False
        ),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    found, adapters = find_base(str(base)), find_adapters([str(tmp_path / "adapter")])
    loaded = load_with_adapters(found, adapters, device=torch.device("cpu"))
    assert type(loaded.model).__name__ == name
    assert (class_name(found, adapters[0]) or name) == name
    state = {k: v for k, v in loaded.model.state_dict().items() if "lora_B" in k}
    (weight,) = state.values()
    assert key in next(iter(state))
    (trained,) = [v for k, v in tuned.state_dict().items() if "lora_B" in k]
    assert torch.equal(weight, trained)
    # Its folder has no processor: a reason where the class sees, none where it reads text.
    assert bool(find_images(found, adapters)[1]) == ("Conditional" in name)
    assert class_name(found, None) == "Qwen3_5ForConditionalGeneration"

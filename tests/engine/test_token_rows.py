"""Rows of embeddings that train (``trainable_token_indices``), compared with PEFT's own model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama_config, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.files.description import describe, inject_as_described
from lightning_peft.errors import CheckpointError, ConfigError, UnsupportedError
from lightning_peft.export.adapters import find_adapter
from lightning_peft.export.merged_folder import base_of, merge_into_folder

from .reference import injected, output_of, refused

X = {"input_ids": torch.tensor([[1, 3, 7, 5, 3], [2, 7, 7, 1, 0]])}
ROWS = [7, 3]


def gemma() -> Any:
    """A tiny model whose embedding scales what it looks up."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    ).eval()


BASES = {
    "untied": lambda: tiny_llama(tied=False),
    "tied": lambda: tiny_llama(tied=True),
    "scaled": gemma,
    "both": lambda: tiny_llama(tied=False),
}


def config(**settings: Any) -> LoraConfig:
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": ROWS, **settings}
    return LoraConfig(r=4, lora_alpha=8, **settings)


def train(model: nn.Module, steps: int) -> list[float]:
    losses = []
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**X, labels=X["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", BASES)
def test_ten_steps_files_and_merges_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    base = BASES[kind]()
    both = {"embed_tokens": ROWS, "lm_head": [5]}
    wanted = config(trainable_token_indices=both if kind == "both" else ROWS)
    torch.manual_seed(1)
    theirs = get_peft_model(copy.deepcopy(base), wanted)
    torch.manual_seed(1)
    mine = injected(copy.deepcopy(base), wanted)
    torch.testing.assert_close(train(mine, 10), train(theirs, 10), rtol=1e-5, atol=1e-6)
    theirs.eval(), mine.eval()
    expected = output_of(theirs, X)
    torch.testing.assert_close(output_of(mine, X), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, output_of(base, X), atol=1e-2)

    folder = lightning_peft.save_adapter(mine, tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    written = [load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "theirs")]
    assert written[0].keys() == written[1].keys()
    back = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(output_of(back, X), output_of(mine, X), rtol=1e-5, atol=1e-6)
    read = copy.deepcopy(base)
    lightning_peft.load_adapter(read, tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(output_of(read, X), expected, rtol=1e-5, atol=1e-6)
    names = {n for n, p in read.named_parameters() if p.requires_grad}
    assert names == {n for n, p in mine.named_parameters() if p.requires_grad}
    with lightning_peft.disable_adapters(read):
        assert torch.equal(output_of(read, X), output_of(base, X))

    copied = copy.deepcopy(read)
    lightning_peft.merge(copied)
    torch.testing.assert_close(output_of(copied, X), expected, rtol=1e-4, atol=1e-5)
    lightning_peft.unmerge(copied)
    torch.testing.assert_close(output_of(copied, X), expected, rtol=1e-4, atol=1e-5)
    lightning_peft.merge(copied)
    plain = lightning_peft.unload(copied)
    assert [type(child) for child in plain.modules()] == [type(x) for x in base.modules()]
    torch.testing.assert_close(output_of(plain, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_check_passes(tied: bool, quantized: bool) -> None:
    model = injected(
        tiny_llama(tied=tied),
        trainable_token_indices=ROWS,
        r=4,
        quantization_config=engine.quantization_config() if quantized else None,
    )
    verification = lightning_peft.verify(model, {**X, "labels": X["input_ids"]})
    assert verification.passed, verification
    assert "embed_tokens[2 tokens]" in str(lightning_peft.report(model))


def test_rows_in_peft_layers_of_dora(tmp_path: Path) -> None:
    base = tiny_llama(tied=True)
    torch.manual_seed(1)
    mine = injected(copy.deepcopy(base), config(use_dora=True))
    train(mine, 3)
    folder = lightning_peft.save_adapter(mine, tmp_path)
    back = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(output_of(back, X), output_of(mine, X), rtol=1e-4, atol=1e-5)
    read = copy.deepcopy(base)
    lightning_peft.load_adapter(read, folder)
    torch.testing.assert_close(output_of(read, X), output_of(mine, X), rtol=1e-5, atol=1e-6)


def test_padding_stays_as_it_was() -> None:
    model = injected(tiny_llama(), trainable_token_indices=[0, 7], r=4)
    model.model.embed_tokens.padding_idx = 0
    train(model, 2)
    layer = model.model.embed_tokens
    rows = layer.token_rows["default"].original
    changed = (layer.trainable_tokens_delta["default"] != rows).any(1)
    assert changed.tolist() == [False, True]


def test_adapters_with_the_same_rows_run_one_at_a_time() -> None:
    base = tiny_llama(tied=True)
    model = injected(copy.deepcopy(base), config())
    train(model, 2)
    first = output_of(model, X)
    lightning_peft.inject(model, config(), adapter_name="other")
    lightning_peft.set_adapter(model, "other")
    # From the base, not from the rows of the first.
    torch.testing.assert_close(output_of(model, X), output_of(base, X))
    with pytest.raises(ConfigError, match=r"cannot run together:\n.*trains the rows \[3, 7\]"):
        lightning_peft.set_adapter(model, ["default", "other"])
    lightning_peft.set_adapter(model, "default")
    torch.testing.assert_close(output_of(model, X), first)


# --- a vocabulary that was made larger ------------------------------------------------------------

NEW = {"input_ids": torch.tensor([[1, 3, 65, 64]])}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: Any, tmp_path: Path) -> Path:
    """The folder of a base with 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    made = llama_config(vocab_size=64, **sizes)
    made.tie_word_embeddings = request.param
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def larger(folder: Path, seed: int) -> Any:
    """The base with two more tokens, whose rows are random."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(66, mean_resizing=False)
    return model


def new_rows(model: Any) -> dict[str, list[int]]:
    tied = model.config.tie_word_embeddings
    return dict.fromkeys(["embed_tokens"] if tied else ["embed_tokens", "lm_head"], [64, 65])


def test_new_tokens_are_saved_alone(folder: Path, tmp_path: Path) -> None:
    model = larger(folder, 1)
    rows = new_rows(model)
    lightning_peft.inject(model, config(trainable_token_indices=rows))
    lightning_peft.engine.set_adapter(model, "default")
    with torch.no_grad():
        for param in engine.all_adapter_parameters(model):
            param.add_(torch.randn_like(param) / 10)
    expected = output_of(model, NEW)
    state = engine.trainable_state_dict(model)
    assert not any(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in state)
    adapter = lightning_peft.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sorted(v.shape for k, v in tensors.items() if "tokens" in k) == [(2, 32)] * len(rows)

    # Bases with other random rows, and of the size in the file.
    for other in (larger(folder, 2), AutoModelForCausalLM.from_pretrained(folder).eval()):
        lightning_peft.load_adapter(other, adapter)
        torch.testing.assert_close(output_of(other, NEW), expected)
    resumed = AutoModelForCausalLM.from_pretrained(folder).eval()
    inject_as_described(resumed, describe(model))
    engine.load_trainable_state_dict(resumed, state)
    torch.testing.assert_close(output_of(resumed, NEW), expected)
    theirs = PeftModel.from_pretrained(larger(folder, 3), str(adapter)).eval()
    torch.testing.assert_close(output_of(theirs, NEW), expected, rtol=1e-4, atol=1e-5)

    found = find_adapter(str(adapter))
    merge_into_folder(found, tmp_path / "merged", base_of(found), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 66
    torch.testing.assert_close(output_of(merged, NEW), expected, rtol=1e-4, atol=1e-4)


def test_new_tokens_that_do_not_train_are_saved_in_full(folder: Path) -> None:
    model = injected(larger(folder, 1), config(trainable_token_indices=[65]))
    assert "model.embed_tokens.weight" in engine.trainable_state_dict(model)


# --- what is refused ------------------------------------------------------------------------------


def renormed() -> Any:
    model = tiny_llama()
    model.model.embed_tokens.max_norm = 1.0
    return model


REFUSED = {
    "beyond": (tiny_llama, {"trainable_token_indices": [3, 9999]}, r"tokens \[9999\] of a vocab"),
    "name": (tiny_llama, {"trainable_token_indices": {"wte": [3]}}, "'wte' matches no layer"),
    "norm": (tiny_llama, {"trainable_token_indices": {"norm": [3]}}, "has no rows for tokens"),
    "max_norm": (renormed, {}, "max_norm=1.0"),
    "adapter": (tiny_llama, {"target_modules": ["embed_tokens"]}, "by target_modules too"),
    "tied head": (
        lambda: tiny_llama(tied=True),
        {"target_modules": ["q_proj", "lm_head"]},
        "lm_head gets an adapter by target_modules too",
    ),
    "in full": (tiny_llama, {"modules_to_save": ["embed_tokens"]}, "is trained in full"),
    "two sets": (
        lambda: tiny_llama(tied=True),
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
        "share one weight, and train other rows",
    ),
    "no embedding": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        {"target_modules": ["0"]},
        "no input embeddings: name the layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_train_are_refused(case: str) -> None:
    build, settings, message = REFUSED[case]
    with refused(module := build(), (ConfigError, UnsupportedError), message):
        lightning_peft.inject(module, config(**settings))


@pytest.mark.parametrize("value", [[], [1, 1], [-1], ["a"], {}, {"embed_tokens": []}])
def test_values_that_are_no_tokens_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="a list of different token numbers"):
        lightning_peft.inject(tiny_llama(), trainable_token_indices=value)


def test_an_adapter_on_trained_rows_is_refused() -> None:
    model = injected(tiny_llama(), config())
    with refused(model, UnsupportedError, "no room for another adapter"):
        wanted = LoraConfig(target_modules=["embed_tokens"])
        lightning_peft.inject(model, wanted, adapter_name="other")


def test_rows_in_another_order_do_not_fit(tmp_path: Path) -> None:
    base = tiny_llama()
    folder = lightning_peft.save_adapter(injected(copy.deepcopy(base), config()), tmp_path)
    other = injected(base, config(trainable_token_indices=ROWS[::-1]))
    with pytest.raises(CheckpointError, match="trainable_token_indices"):
        lightning_peft.load_adapter(other, folder)

"""Adapters on rows of fused layers, ``qkv[q]``: nothing else changes, in training and in files."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Phi4MultimodalAudioConfig,
)
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.selection.rows import CHECKED, ORDERED, OTHER_ORDERS, is_checked
from lightning_peft.errors import CheckpointError, LifecycleError, UnsupportedError

from .reference import injected, output_of, randomize, refused, relative_error

NF4 = {"quantization_config": engine.quantization_config()}
QV = ["qkv[q]", "qkv[v]"]


class Attention(nn.Module):
    """Reads its queries, keys and values off one layer, as a ViT of timm does."""

    def __init__(self, width: int = 64, heads: int = 4, by_head: bool = False) -> None:
        super().__init__()
        self.num_heads, self.multi_query = heads, not by_head
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        shape = rows, length, 3, self.num_heads, width // self.num_heads
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(mixed.transpose(1, 2).reshape(rows, length, width))


class ViT(nn.Module):
    """Two blocks and a head."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(**settings), Attention(**settings))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def phi3(**changes: Any) -> Phi3ForCausalLM:
    """Phi-3 with 4 heads of queries and 2 of keys and values, of 8 numbers each."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = Phi3Config(
        **sizes, **tokens, **changes, hidden_size=32, intermediate_size=64, vocab_size=97
    )
    return Phi3ForCausalLM(config).eval()


def codegen() -> CodeGenForCausalLM:
    """CodeGen, with its queries, values and keys in four groups."""
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "n_positions": 16, "rotary_dim": 4}
    return CodeGenForCausalLM(CodeGenConfig(vocab_size=97, **sizes))


class AudioMLP(Phi4MultimodalAudioMLP):
    """A subclass in another module."""

    def __init__(self) -> None:
        super().__init__(Phi4MultimodalAudioConfig(hidden_size=8, intermediate_size=12))


def steps(model: nn.Module, batch: Any, count: int = 2) -> None:
    """Trains what trains, with weight decay."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(count):
        output_of(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


CASES = {
    "vit": (ViT, QV, "blocks.0.qkv", [(0, 64), (128, 192)]),
    "vit-nf4": (ViT, QV, "blocks.0.qkv", [(0, 64), (128, 192)]),
    "gpt2": (tiny_gpt2, ["c_attn[q]", "c_attn[v]"], "transformer.h.0.attn.c_attn", None),
    "gqa": (phi3, ["qkv_proj[v]"], "model.layers.0.self_attn.qkv_proj", [(48, 64)]),
    "gate-nf4": (phi3, ["gate_up_proj[gate]"], "model.layers.0.mlp.gate_up_proj", [(0, 64)]),
    "numbers": (phi3, ["qkv_proj[3:5]"], "model.layers.0.self_attn.qkv_proj", [(3, 5)]),
    "share": (ViT, ["qkv[2/3]", "qkv[3/3]"], "blocks.0.qkv", [(64, 192)]),
}


@pytest.mark.parametrize("kind", CASES)
def test_only_these_rows_train_and_files_say_the_same(kind: str, tmp_path: Path) -> None:
    build, targets, name, rows = CASES[kind]
    torch.manual_seed(0)
    base: Any = build()
    batch = torch.randn(2, 5, 64) if isinstance(base, ViT) else token_batch()
    settings = {"r": 4, "target_modules": targets} | (NF4 if "nf4" in kind else {})
    model = injected(copy.deepcopy(base), **settings)
    layer = model.get_submodule(name)
    with lightning_peft.disable_adapters(model):
        before = layer.weight.detach().clone()
    steps(model, batch)
    b = layer.lora_B["default"].weight.detach()
    if rows is None:
        width = len(b) // 3
        rows = [(0, width), (2 * width, 3 * width)]
    inside = torch.zeros(len(b), dtype=torch.bool)
    for first, last in rows:
        inside[first:last] = True
    assert (b != 0).any(1).equal(inside)
    change = layer.weight.detach() - before
    changed = (change.t() if "gpt2" in kind else change).abs().amax(1)
    assert (changed > 0).equal(inside)
    # What PEFT reads is plain LoRA on the whole layer.
    model.eval()
    expected = output_of(model, batch)
    lightning_peft.save_adapter(model, tmp_path)
    if "nf4" not in kind:
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert relative_error(output_of(theirs, batch), expected) < 1e-6
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[f"base_model.model.{name}.lora_B.weight"].equal(b)
    # What is loaded here trains on with the same rows.
    again = copy.deepcopy(base)
    quantization = settings.get("quantization_config")
    lightning_peft.load_adapter(
        again, tmp_path, is_trainable=True, quantization_config=quantization
    )
    assert relative_error(output_of(again.eval(), batch), expected) == 0
    steps(again.train(), batch)
    assert (again.get_submodule(name).lora_B["default"].weight != 0).any(1).equal(inside)
    lightning_peft.merge(model)
    assert relative_error(output_of(model, batch), expected) < 1e-5


def test_a_checkpoint_knows_the_rows() -> None:
    def built(targets: list[str] = QV) -> ViT:
        torch.manual_seed(0)
        return injected(ViT(), r=4, target_modules=targets)

    model, x = built(), torch.randn(2, 5, 64)
    steps(model, x)
    described, state = engine.describe(model), engine.trainable_state_dict(model)
    torch.manual_seed(0)
    fresh = ViT()
    engine.inject_as_described(fresh, described)
    engine.load_trainable_state_dict(fresh, state)
    assert fresh(x).equal(model(x))
    for trained in (model, fresh):
        steps(trained, x)
    assert fresh(x).equal(model(x))
    with pytest.raises(CheckpointError, match=r"the rows of layers .* \[\[0, 64\], \[128, 192\]\]"):
        engine.check_description(built(["qkv[k]"]), described)
    with pytest.raises(CheckpointError, match="the rows of layers"):
        engine.check_description(built(["qkv"]), described)


def test_the_report_names_them_and_verification_passes() -> None:
    model, x = injected(ViT(), r=4, target_modules=QV), torch.randn(2, 5, 64)
    (part,) = lightning_peft.report(model).parts
    assert part.adapted == {"qkv[0:64, 128:192]": 2}
    made = lightning_peft.verify(model, x, lambda module, batch: module(batch).square().mean())
    assert made.passed, made
    randomize(model)
    assert model.blocks[0].qkv.factors("default")[1][64:128].eq(0).all()


def test_two_adapters_have_rows_of_their_own() -> None:
    model, x = injected(ViT(), r=4, target_modules=["qkv[q]"]), torch.randn(2, 5, 64)
    injected(model, r=2, target_modules=["qkv[k]"], adapter_name="second")
    randomize(model)
    layer = model.blocks[0].qkv
    lightning_peft.set_adapter(model, ["default", "second"])
    with torch.no_grad():
        both = layer.weight - layer.stored_weight()
    for name, rows in (("default", (0, 64)), ("second", (64, 128))):
        only = layer.delta_weight(name)
        assert relative_error(both[slice(*rows)], only[slice(*rows)]) < 1e-5
        assert only.abs().sum() == only[slice(*rows)].abs().sum()
    assert both[128:].eq(0).all()
    assert model(x).shape == (2, 3)


def test_a_file_for_other_rows_is_refused(tmp_path: Path) -> None:
    whole = injected(ViT(), r=4, target_modules=["qkv"])
    randomize(whole)
    lightning_peft.save_adapter(whole, tmp_path)
    model = injected(ViT(), r=4, target_modules=QV)
    with refused(model, CheckpointError, r"for the rows \(\(0, 64\), \(128, 192\)\)"):
        lightning_peft.load_adapter(model, tmp_path, check_base=False)


REFUSED = {
    "whole and rows": (ViT, ["qkv", "qkv[q]"], "as a whole, and rows of it"),
    "unknown words": (ViT, ["qkv[queries]"], "rows are not written as .queries."),
    "past the end": (ViT, ["qkv[128:200]"], "is not a range in its 192 rows"),
    "uneven": (ViT, ["qkv[1/5]"], "does not fit its 192 rows"),
    "no such piece": (ViT, ["proj[q]"], "which rows of a proj of Attention are .q. is not known"),
    "by head": (lambda: ViT(by_head=True), ["qkv[q]"], "has the rows of its qkv head by head"),
    "groups of heads": (
        codegen,
        ["qkv_proj[q]"],
        "CodeGenAttention has the rows of its qkv_proj four",
    ),
    "up first": (AudioMLP, ["gate_up_proj[gate]"], "gate_up_proj first up, then gate"),
    "not linear": (tiny_llama, ["embed_tokens[0:4]"], "rows are those of a linear layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_are_not_there_are_refused(kind: str) -> None:
    build, targets, message = REFUSED[kind]
    model = build()
    with refused(model, UnsupportedError, message):
        lightning_peft.inject(model, r=4, target_modules=targets)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_rows_are_for_plain_lora(settings: dict[str, Any]) -> None:
    model = ViT()
    with refused(model, UnsupportedError, r"qkv\[q\]: rows are for LoRA in place"):
        lightning_peft.inject(model, r=4, target_modules=["qkv[q]"], **settings)


def test_an_order_that_was_not_checked_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        injected(ViT(), r=4, target_modules=["qkv[v]"])
    assert caplog.text.count("the rows 128:192 are taken, with q, k, v one after the other") == 1
    caplog.clear()
    injected(ViT(), r=4, target_modules=["qkv[128:192]"])
    injected(tiny_gpt2(), r=4, target_modules=["c_attn[v]"])
    assert not caplog.text


def test_every_class_of_transformers_with_such_a_layer_was_read() -> None:
    """A class that is not listed is warned of; a listed one whose code is new has to be read."""
    made = re.compile(rf"self\.({'|'.join(ORDERED)}) *= *(nn\.\w*Linear|Conv1D)\(")
    kind = re.compile(r"^class (\w+)(?:\((.*)\))?:", re.MULTILINE)
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        if not any(f"self.{leaf} =" in text for leaf in ORDERED):
            continue
        starts = [*kind.finditer(text)]
        ends = [one.start() for one in starts[1:]] + [len(text)]
        owners: set[str] = set()
        for one, end in zip(starts, ends, strict=True):
            if made.search(text, one.end(), end) or owners & {*(one[2] or "").split(", ")}:
                owners.add(one[1])
        found |= {f"{file.parent.name}.{name}" for name in owners}
    assert found
    unread = {name for name in found if name.split(".")[1] not in OTHER_ORDERS} - CHECKED
    assert not unread
    assert is_checked(type(tiny_gpt2().transformer.h[0].attn))
    assert not is_checked(AudioMLP)


def test_other_rows_than_those_there_are_noticed() -> None:
    model = injected(ViT(), r=4, target_modules=["qkv[q]"])
    assert engine.rows_of(model, ["blocks.0.qkv"], LoraConfig(target_modules=["qkv[k]"])) == (
        {"blocks.0.qkv": ((64, 128),)},
        [],
    )
    wrapped = ViT()
    get_peft_model(wrapped, LoraConfig(r=4, target_modules=["qkv"]))
    with pytest.raises(LifecycleError, match="adapters on all rows, asked for some"):
        lightning_peft.inject(wrapped, LoraConfig(r=4, target_modules=["qkv[q]"]))

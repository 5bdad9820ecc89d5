"""Batches whose rows have different adapters, compared with PEFT's ``adapter_names``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import stack, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import ConfigError, LifecycleError, UnsupportedError

from .reference import injected, output_of, randomize, refused

NAMES = ["fr", "__base__", "de", "fr", "it"]
X = {"input_ids": torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(0))}
CONFIGS = {
    "fr": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    "de": LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "embed_tokens"]),
    "it": LoraConfig(r=8, lora_alpha=4, target_modules=["v_proj"]),
}


def with_adapters(base: nn.Module, configs: dict[str, LoraConfig], **settings: Any) -> Any:
    for name, config in configs.items():
        lightning_peft.inject(base, copy.deepcopy(config), adapter_name=name, **settings)
    randomize(base)
    return base.eval()


def one_by_one(model: Any, x: Any, names: list[str]) -> torch.Tensor:
    """The output of each row alone."""
    rows = []
    for i, name in enumerate(names):
        some = {k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1]
        if name == "__base__":
            with lightning_peft.disable_adapters(model):
                rows.append(output_of(model, some))
        else:
            lightning_peft.set_adapter(model, name)
            rows.append(output_of(model, some))
    return torch.cat(rows)


def test_rows_are_those_of_peft() -> None:
    base = tiny_llama()
    mine = with_adapters(copy.deepcopy(base), CONFIGS)
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(CONFIGS["fr"]), adapter_name="fr")
    for name in ("de", "it"):
        theirs.add_adapter(name, copy.deepcopy(CONFIGS[name]))
    state = {n: p for n, p in mine.named_parameters() if "lora_" in n}
    for name, param in theirs.named_parameters():
        if "lora_" in name:
            param.data.copy_(state[name.removeprefix("base_model.model.")])
    expected = theirs.eval()(**X, adapter_names=NAMES).logits
    active = [x.active_adapters for x in engine.adapted_layers(mine).values()]
    with lightning_peft.mixed_adapters(mine, NAMES):
        found = output_of(mine, X)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(x) or "effective_weight" in vars(x) for x in mine.modules())
    assert active == [x.active_adapters for x in engine.adapted_layers(mine).values()]
    torch.testing.assert_close(one_by_one(mine, X, NAMES), expected, rtol=1e-4, atol=1e-5)


DORA = {"de": LoraConfig(r=4, use_dora=True, target_modules=["q_proj"])}
ROWS = {"de": LoraConfig(r=4, target_modules=["v_proj"], trainable_token_indices=[5, 9])}


@pytest.mark.parametrize("kind", ["quantized", "DoRA", "tied rows"])
def test_rows_are_those_of_each_adapter_alone(kind: str) -> None:
    settings = {"quantization_config": engine.quantization_config()} if kind == "quantized" else {}
    configs = {"quantized": CONFIGS, "DoRA": {**CONFIGS, **DORA}, "tied rows": {**ROWS}}[kind]
    if kind == "DoRA":
        configs = {"fr": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), **DORA}
    model = with_adapters(tiny_llama(tied=kind == "tied rows"), configs, **settings)
    names = [name if name in configs else "__base__" for name in NAMES]
    with lightning_peft.mixed_adapters(model, names):
        found = output_of(model, X)
    torch.testing.assert_close(found, one_by_one(model, X, names), rtol=1e-4, atol=1e-5)


def test_convolutions_and_keywords() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3, stride=2)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.up(input=self.conv(x), output_size=(16,)).mean(-1))

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["conv", "up"])
    model = with_adapters(Net(), {"a": config, "b": config})
    x, names = torch.randn(4, 4, 9), ["a", "b", "__base__", "b"]
    with lightning_peft.mixed_adapters(model, names):
        found = model(x)
    torch.testing.assert_close(found, one_by_one(model, x, names))


def test_adapters_train_at_once_on_their_rows() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    lightning_peft.set_adapter(model, ["fr", "de", "it"])
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with lightning_peft.mixed_adapters(model, NAMES):
        loss = output_of(model, X).pow(2).sum()
    loss.backward()
    together = {n: p.grad.clone() for n, p in trained.items()}
    model.zero_grad()
    for i, name in enumerate(NAMES):
        if name != "__base__":
            lightning_peft.set_adapter(model, name)
            output_of(model, {"input_ids": X["input_ids"][i : i + 1]}).pow(2).sum().backward()
    for name, grad in together.items():
        torch.testing.assert_close(grad, trained[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_generation_and_chat_copies() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = []
    for i, name in enumerate(["fr", "de"]):
        lightning_peft.set_adapter(model, name)
        alone.append(model.generate(X["input_ids"][i : i + 1], **options))
    for outer in (False, True):
        mixed = lightning_peft.mixed_adapters(model, ["fr", "de"])
        with engine.ready_for_inference(model, copies=outer), mixed:
            together = model.generate(X["input_ids"][:2], **options)
        assert together.tolist() == torch.cat(alone).tolist()
    with lightning_peft.disable_adapters(model), lightning_peft.mixed_adapters(model, ["fr", "de"]):
        off = output_of(model, {"input_ids": X["input_ids"][:2]})
    with lightning_peft.disable_adapters(model):
        torch.testing.assert_close(off, output_of(model, {"input_ids": X["input_ids"][:2]}))


# --- what is refused ------------------------------------------------------------------------------


def enter(model: nn.Module, names: list[str]) -> None:
    with lightning_peft.mixed_adapters(model, names):
        pass


def test_names_and_rows_are_checked() -> None:
    model = with_adapters(tiny_llama(), CONFIGS)
    for names in (["en"], []):
        with refused(model, ConfigError, "this module's adapters are 'fr', 'de', 'it'"):
            enter(model, names)
    with lightning_peft.mixed_adapters(model, NAMES[:2]):
        with pytest.raises(UnsupportedError, match="gets 5 rows, and adapter_names names 2"):
            output_of(model, X)
        with pytest.raises(UnsupportedError, match="each row has another weight"):
            model.model.layers[0].self_attn.q_proj.weight.sum()
    lightning_peft.merge(model)
    with pytest.raises(LifecycleError, match="merged"):
        enter(model, NAMES)


def test_what_all_rows_share_is_refused() -> None:
    model = injected(tiny_llama(), r=2, modules_to_save=["norm"])
    with refused(model, UnsupportedError, "it was trained in full"):
        enter(model, ["default", "__base__"])
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    lightning_peft.inject(attention, r=2, target_modules=["attn"])
    with refused(attention, UnsupportedError, r"attn \(.*its input is not a batch of rows"):
        enter(attention, ["default", "__base__"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_refused(reentrant: bool) -> None:
    model = injected(stack(), r=2).train()
    x = torch.randn(2, 96, requires_grad=True)
    message = pytest.raises(UnsupportedError, match="Gradient checkpointing with mixed adapters")
    with lightning_peft.mixed_adapters(model, ["default", "__base__"]), message:
        checkpoint(model, x, use_reentrant=reentrant)

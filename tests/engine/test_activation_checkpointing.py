"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_peft import engine
from lightning_peft.compat.transformers import enable_gradient_checkpointing
from lightning_peft.engine.training.activation_checkpointing import CheckpointedBlock
from lightning_peft.errors import UnsupportedError

WIDTH = 16


class Block(nn.Module):
    """Everything that a naive second computation gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.norm = nn.BatchNorm1d(4 * WIDTH)
        self.cumulative = nn.BatchNorm1d(4 * WIDTH, momentum=None)
        self.rough = nn.utils.parametrizations.spectral_norm(nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(()))

    def forward(
        self, state: tuple[torch.Tensor, list[float]], *, shift: Any = None, gain: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        x, seen = state
        y = self.cumulative(self.rough(self.norm(self.up(x))).relu())
        # Replaced, not changed in place; and what is computed depends on it.
        self.scale = self.scale * 0.9
        seen.append(self.scale.item())
        y = self.down(self.drop(y)) * gain * self.scale
        return (x + (y if shift is None else y + shift), seen)


class Flagged(GradientCheckpointingLayer):
    """A layer of transformers with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=0.5)

    def forward(self, x: torch.Tensor, gain: Any = None) -> torch.Tensor:
        return x + torch.dropout(self.norm(self.up(x)), 0.2, self.training) * gain


class Stack(nn.Module):
    def __init__(self, depth: int = 3, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))
        self.first = self.blocks[0]
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = torch.tensor(1.5)
        if isinstance(self.blocks[0], Flagged):
            for block in self.blocks:
                x = block(x, gain=gain)
            return self.head(x)
        state: Any = (x, [])
        for number, block in enumerate(self.blocks):
            shift = {"by": 0.1}["by"] if number else None
            state = block(state, shift=shift, gain=gain)
        assert len(state[1]) == len(self.blocks)
        return self.head(state[0])


class Encoder(nn.Module):
    """torch's own transformer, with a mask and dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        return self.head(self.encoder(x.view(2, 4, WIDTH), mask=mask, is_causal=True))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=0.2, **sizes, **heads))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str] | None, str]] = {
    "blocks": (Stack, ["up", "down"], "3 Block of Stack"),
    "flagged": (lambda: Stack(kind=Flagged), ["up"], "3 Flagged of Stack"),
    "torch": (Encoder, ["linear1", "linear2"], "3 TransformerEncoderLayer of Encoder"),
    "llama": (llama, None, "3 LlamaDecoderLayer of LlamaForCausalLM"),
    "gpt2": (gpt2, None, "3 GPT2Block of GPT2LMHeadModel"),
}


def adapted(kind: str, quantized: bool = False) -> nn.Module:
    make, targets, _ = MODELS[kind]
    torch.manual_seed(1)
    module = make()
    config = None
    if hasattr(module, "config"):
        # Keys that went through a cache have another layout, and sums another order.
        module.config.use_cache = False
    if quantized:
        config = engine.quantization_config({"load_in_4bit": True})
    engine.inject(module, r=4, target_modules=targets, lora_dropout=0.2, quantization_config=config)
    with torch.no_grad():
        for name, param in module.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.3)
    return module.train()


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    if hasattr(module, "config"):
        ids = torch.randint(64, (2, 8), generator=draw)
        return module(input_ids=ids, labels=ids).loss
    return module(torch.randn(8, WIDTH, generator=draw)).square().mean()


def train(module: nn.Module, bf16: bool) -> list[Any]:
    """Trains three steps with an eval pass in between; returns all that could differ."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    seen: list[Any] = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(module, step)
        # A recomputation must not depend on what came after the forward pass.
        module.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            seen.append(loss_of(module, 10).item())
        loss.backward()
        module.train()
        seen += [loss.item(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    seen += [buffer.clone() for buffer in module.buffers()]
    return [*seen, torch.get_rng_state()]


class Storages(TorchDispatchMode):
    """Remembers all memory that is allocated, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                reference = StorageWeakRef(one.untyped_storage())
                self.seen[reference.cdata] = (reference, one.untyped_storage().nbytes())
        return result

    def alive(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def kept(module: nn.Module, batch: int) -> int:
    """Bytes that are alive between the forward and the backward pass."""
    x = torch.randn(batch, WIDTH)
    with Storages() as storages:
        loss = module(x).square().mean()
    kept = storages.alive()
    loss.backward()
    return kept


@pytest.mark.parametrize("kind", [Block, Flagged])
def test_activations_are_not_kept(kind: type[nn.Module]) -> None:
    """Each further block keeps its input, and nothing else that grows with the batch."""

    def per_row_and_block(wanted: bool) -> float:
        found = []
        for depth in (2, 6):
            for batch in (64, 192):
                torch.manual_seed(1)
                module = Stack(depth, kind).train()
                engine.inject(module, r=4, target_modules=["up"])
                engine.checkpoint_activations(module, wanted)
                found.append(kept(module, batch))
        return ((found[3] - found[2]) - (found[1] - found[0])) / 128 / 4

    one_input = 4 * WIDTH
    assert per_row_and_block(True) == one_input
    assert per_row_and_block(False) > 3 * one_input


def test_blocks_stay_the_objects_that_they_were() -> None:
    module = adapted("blocks")
    block, names = module.blocks[1], list(module.state_dict())
    done = engine.checkpoint_activations(module, True)
    assert module.blocks[1] is block
    assert module.first is module.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block, CheckpointedBlock)
    assert list(module.state_dict()) == names
    assert not hasattr(block, "weight")
    other = copy.deepcopy(module)
    assert other.first is other.blocks[0]
    done.disable()
    assert type(block) is Block


def copied(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("kind", "way"), [("blocks", copy.deepcopy), ("torch", copied)])
def test_copies_are_checkpointed_too(kind: str, way: Callable[[nn.Module], nn.Module]) -> None:
    module = adapted(kind)
    engine.checkpoint_activations(module, True)
    other = way(module)
    found, mine = (
        [block for block in each.modules() if isinstance(block, CheckpointedBlock)]
        for each in (other, module)
    )
    assert [type(block) for block in found] == [type(block) for block in mine]
    assert len(found) == 3
    assert not {*map(id, found)} & {*map(id, mine)}
    for a, b in zip(train(other, False), train(module, False), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_transformers_model_gets_its_cache_back() -> None:
    module = adapted("llama")

    def switches() -> set[str]:
        return {key for m in module.modules() for key in m.__dict__ if "checkpointing" in key}

    before = switches()
    ids = torch.arange(6)[None]
    module.config.use_cache = True
    config = module.config.to_dict()
    done = engine.checkpoint_activations(module, True)
    assert module.config.use_cache is False
    assert module(input_ids=ids).past_key_values is None
    done.disable()
    assert module.config.to_dict() == config
    assert switches() == before
    assert module.eval()(input_ids=ids).past_key_values.get_seq_length() == 6


def test_what_the_user_switched_on_is_left_alone() -> None:
    module = adapted("llama")
    enable_gradient_checkpointing(module)
    layer = module.model.layers[0]
    function = layer._gradient_checkpointing_func
    done = engine.checkpoint_activations(module, True)
    assert "already" in done.descriptions[0]
    assert layer._gradient_checkpointing_func is function
    done.disable()
    assert layer.gradient_checkpointing is True


def test_a_checkpoint_of_the_users_is_not_doubled() -> None:
    """The block is computed twice in all, not three times."""
    counts = []
    for wanted in (False, True):
        plain = Stack(kind=nn.Identity)
        calls = [0]

        class Counted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up = nn.Linear(WIDTH, WIDTH)

            def forward(self, x: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
                calls[0] += 1
                return self.up(x).tanh()

        plain.blocks = nn.ModuleList([Counted(), Counted()])
        engine.inject(plain, r=4, target_modules=["up"])
        done = engine.checkpoint_activations(plain, wanted)
        assert bool(done.descriptions) is wanted
        x = torch.randn(4, WIDTH)
        for block in plain.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        x.sum().backward()
        counts.append(calls[0])
    assert counts == [4, 4]


def test_backward_may_come_twice() -> None:
    results = []
    for wanted in (False, True):
        module = adapted("blocks")
        engine.checkpoint_activations(module, wanted)
        torch.manual_seed(2)
        loss = loss_of(module, 0)
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in module.parameters() if p.grad is not None])
        results[-1] += list(module.buffers())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_input_that_is_changed_before_backward_is_noticed() -> None:
    module = Stack(2, Flagged).train()
    engine.inject(module, r=4, target_modules=["up"])
    engine.checkpoint_activations(module, True)
    gain = torch.tensor(1.5)
    out = module.blocks[1](module.blocks[0](torch.randn(8, WIDTH), gain=gain), gain=gain)
    gain.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_outside_of_training_the_block_is_called_as_it_is(mode: str) -> None:
    module = adapted("blocks")
    engine.checkpoint_activations(module, True)
    module.train(mode != "eval")
    calls = []
    module.blocks[1].up.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(mode == "eval"):
        loss = loss_of(module, 0)
    if mode == "eval":
        loss.backward()
    assert calls == [1]


class Towers(nn.Module):
    """Stages of blocks, blocks with several heads, and linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Sequential(*(self.mlp() for _ in range(2)))) for _ in range(2))
        )
        self.wide = nn.ModuleList(Wide() for _ in range(2))
        self.row = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.shared = nn.ModuleList([Wide()] * 2)
        self.single = nn.ModuleList([self.mlp()])
        own = self.mlp()
        own.forward = own.forward
        self.patched = nn.ModuleList([own, self.mlp()])

    @staticmethod
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Towers.mlp() for _ in range(2))
        self.out = nn.Linear(WIDTH, 4 * WIDTH)


def test_which_blocks_are_taken() -> None:
    module = Towers()
    engine.inject(module, r=2, target_modules="all-linear")
    done = engine.checkpoint_activations(module, "auto")
    found = {name for name, m in module.named_modules() if isinstance(m, CheckpointedBlock)}
    assert found == {
        # The innermost that holds about all of the outer one.
        *(f"stages.{i}.0.{j}" for i in range(2) for j in range(2)),
        # The outer where heads are a small share of it.
        "wide.0",
        "wide.1",
        # One object, used twice.
        "shared.0",
    }
    done.disable()
    assert not any(isinstance(m, CheckpointedBlock) for m in module.modules())


def test_where_nothing_repeats() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    engine.inject(module, r=2, target_modules=["0"])
    assert engine.checkpoint_activations(module, "auto").descriptions == []
    with pytest.raises(UnsupportedError, match=r"=True: no block repeats in Sequential.*'auto'"):
        engine.checkpoint_activations(module, True)


def python_calls(module: nn.Module) -> int:
    """Returns how often Python calls a function in a training step."""
    ids, count = torch.arange(12)[None], 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    for profile in (None, note):
        sys.setprofile(profile)
        try:
            module(input_ids=ids, labels=ids).loss.backward()
        finally:
            sys.setprofile(None)
    return count


def test_python_has_about_as_much_to_do_as_with_torchs_own_checkpoint() -> None:
    ours, theirs = adapted("llama"), adapted("llama")
    bare = python_calls(ours)
    engine.checkpoint_activations(ours, True)
    enable_gradient_checkpointing(theirs, use_reentrant=False)
    expected = python_calls(theirs)
    assert bare < 0.6 * expected
    assert python_calls(ours) <= 1.1 * expected

"""Checkpoints hold everything but the frozen base, and come back strictly or not at all."""

from __future__ import annotations

import io

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import BaseMismatchError, CheckpointError, LifecycleError

from .reference import injected, output_of, randomize, refused

NF4 = engine.quantization_config()
FP4 = engine.quantization_config(bnb_4bit_quant_type="fp4")


class Normed(nn.Module):
    """Adapted as a whole, with batch statistics that change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


def built(build, seed: int = 0, **settings) -> nn.Module:
    """Builds the same base for the same seed, then injects."""
    torch.manual_seed(seed)
    return injected(build(), **({"r": 4} | settings))


def stored(value: object) -> object:
    """Writes and reads ``value`` the way a Trainer's checkpoint is."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SETTINGS = {
    "plain": (tiny_llama, {}),
    "tied": (lambda: tiny_llama(tied=True), {}),
    "conv1d": (tiny_gpt2, {"quantization_config": NF4}),
    "nf4": (tiny_llama, {"quantization_config": NF4}),
    "int8": (tiny_llama, {"quantization_config": engine.quantization_config(load_in_8bit=True)}),
    "saved": (tiny_llama, {"modules_to_save": ["lm_head"], "bias": "all"}),
    "dora": (tiny_llama, {"use_dora": True}),
    "patterns": (tiny_llama, {"rank_pattern": {"q_proj": 2}, "layers_to_transform": [1]}),
    "pissa": (tiny_llama, {"init_lora_weights": "pissa", "quantization_config": NF4}),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_round_trip_through_a_file(kind: str) -> None:
    build, settings = SETTINGS[kind]
    model, batch = built(build, **settings), token_batch()
    randomize(model)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.01)
    expected = output_of(model, batch)
    state = stored(engine.trainable_state_dict(model))
    described = stored(engine.describe(model))
    # Everything but the frozen base.
    params = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, param in params.items() if param.requires_grad}
    buffers = {name for name, _ in model.named_buffers() if name in model.state_dict()}
    assert set(state) == trained | buffers
    # Into a module that was injected with the same settings ...
    fresh = built(build, **settings)
    engine.check_description(fresh, described)
    engine.load_trainable_state_dict(fresh, state)
    assert torch.equal(output_of(fresh, batch), expected)
    # ... and into a bare one, from the description alone.
    torch.manual_seed(0)
    bare = build()
    engine.inject_as_described(bare, described)
    engine.load_trainable_state_dict(bare, state)
    assert torch.equal(output_of(bare, batch), expected)
    assert lightning_peft.report(bare) == lightning_peft.report(model)
    assert {n for n, p in bare.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_batch_statistics_of_an_adapted_module_are_part_of_it() -> None:
    model, x = built(Normed), torch.randn(16, 8) * 3 + 1
    for _ in range(3):
        model.train()(x)
    state = stored(engine.trainable_state_dict(model))
    assert {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= set(state)
    fresh = built(Normed)
    engine.load_trainable_state_dict(fresh, state)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_part_in_torchscript_is_left_as_it_is() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2))
    lightning_peft.inject(model, r=2, target_modules=["0"])
    state = engine.trainable_state_dict(model)
    assert {"0.lora_A.default.weight", "1.1.running_mean"} <= state.keys()


def test_toggled_requires_grad_changes_nothing_of_the_state() -> None:
    model = built(stack)
    keys = set(engine.trainable_state_dict(model))
    for param in model.parameters():
        param.requires_grad_(False)
    assert set(engine.trainable_state_dict(model)) == keys
    model.first._parameters["weight"].requires_grad_(True)
    assert set(engine.trainable_state_dict(model)) == keys


# --- strict ------------------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_named() -> None:
    model = built(stack)
    state = engine.trainable_state_dict(model)
    wrong = dict(state)
    del wrong["first.lora_A.default.weight"]
    wrong["first.lora_C.default.weight"] = torch.zeros(1)
    wrong["head.weight"] = torch.zeros(3, 3)
    with refused(model, CheckpointError, "") as caught:
        engine.load_trainable_state_dict(model, wrong)
    message = str(caught.value)
    assert "missing: first.lora_A.default.weight" in message
    assert "unexpected: first.lora_C.default.weight" in message
    assert "head.weight: (3, 3) in the checkpoint, (10, 96) in the module" in message


def test_a_full_model_is_refused_with_the_fix() -> None:
    model = built(stack)
    for full in (stack().state_dict(), model.state_dict()):
        with pytest.raises(CheckpointError, match="holds the base model too"):
            engine.load_trainable_state_dict(model, full)


def test_a_state_is_not_loaded_into_merged_weights() -> None:
    model = built(stack)
    state = engine.trainable_state_dict(model)
    lightning_peft.merge(model)
    with pytest.raises(LifecycleError, match="unmerge"):
        engine.load_trainable_state_dict(model, state)


# Settings in the checkpoint, the message, and settings now.
DIFFERENT = {
    "rank": ({"r": 8}, "r=8 in the checkpoint and 4 now"),
    "alpha": ({"lora_alpha": 5}, "lora_alpha=5 in the checkpoint and 8 now"),
    "scaling": ({"use_rslora": True}, "use_rslora=True in the checkpoint"),
    "targets": ({"target_modules": ["first"]}, "layer 'second' is adapted in the module only"),
    "quantization": ({"quantization_config": NF4}, "quantization is .*nf4.* and None now"),
    "codes": (
        {"quantization_config": NF4},
        "quantization is .*'nf4'.* in the checkpoint and .*'fp4'.* now",
        {"quantization_config": FP4},
    ),
    "saved": ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\]"),
    "name": ({"adapter_name": "other"}, "adapter 'other' is in the checkpoint only"),
    "method": ({"use_dora": True}, "use_dora=True"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_other_settings_are_named(kind: str) -> None:
    settings, message, *now = DIFFERENT[kind]
    described = engine.describe(built(stack, **settings))
    with pytest.raises(CheckpointError, match=message):
        engine.check_description(built(stack, **dict(*now)), described)


def test_all_differences_come_together() -> None:
    described = engine.describe(built(stack, r=2, use_rslora=True, target_modules=["first"]))
    with pytest.raises(CheckpointError) as caught:
        engine.check_description(built(stack), described)
    for part in ("r=2", "use_rslora", "'second'"):
        assert part in str(caught.value)


def test_settings_that_do_not_decide_may_differ() -> None:
    described = engine.describe(built(stack, lora_dropout=0.1, target_modules=["first", "second"]))
    engine.check_description(built(stack), described)


def test_another_base_is_refused_by_the_names_of_its_tensors() -> None:
    described = engine.describe(built(stack))
    torch.manual_seed(0)
    model = stack()
    with torch.no_grad():
        model.second.weight[3, 4] *= 1.5
    lightning_peft.inject(model, r=4)
    with pytest.raises(BaseMismatchError) as caught:
        engine.check_description(model, described)
    assert "second.weight" in str(caught.value)
    assert "first.weight" not in str(caught.value)
    torch.manual_seed(0)
    with pytest.raises(BaseMismatchError, match="the same seed"):
        engine.inject_as_described(tiny_change(stack()), described)


def tiny_change(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.first.bias[0] += 1
    return model


def test_another_head_is_no_other_base() -> None:
    described = engine.describe(built(stack))
    torch.manual_seed(0)
    model = stack()
    nn.init.zeros_(model.head.weight)
    lightning_peft.inject(model, r=4)
    engine.check_description(model, described)


def test_an_initialisation_with_other_random_numbers_is_noticed() -> None:
    settings = {"init_lora_weights": "pissa_niter_1", "r": 4}
    torch.manual_seed(0)
    model = stack()
    torch.manual_seed(1)
    lightning_peft.inject(model, **settings)
    described = engine.describe(model)
    torch.manual_seed(0)
    other = stack()
    torch.manual_seed(2)
    lightning_peft.inject(other, **settings)
    with pytest.raises(BaseMismatchError, match="rewrote the base in another way"):
        engine.check_description(other, described)


def test_a_format_of_the_future_is_refused() -> None:
    model = built(stack)
    with pytest.raises(CheckpointError, match="has format 3 and this version reads formats"):
        engine.check_description(model, {**engine.describe(model), "format": 3})


# --- restoring from a description ---------------------------------------------------------------


def test_several_parts_and_several_adapters_are_restored() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"text": tiny_llama(layers=1), "other": stack(), "out": stack()})

    torch.manual_seed(0)
    model = injected(build(), r=4, adapt=["text", "other"], adapter_name="a")
    lightning_peft.inject(model, r=2, target_modules=["q_proj"], adapt="text", adapter_name="b")
    lightning_peft.inject(
        model, r=3, target_modules=["first"], adapt="out", adapter_name="a", quantization_config=NF4
    )
    lightning_peft.set_adapter(model, ["a", "b"])
    randomize(model["text"]), randomize(model["other"]), randomize(model["out"])
    state = stored(engine.trainable_state_dict(model))
    described = stored(engine.describe(model))
    torch.manual_seed(0)
    fresh = build()
    engine.inject_as_described(fresh, described)
    engine.load_trainable_state_dict(fresh, state)
    batch, x = token_batch(), torch.randn(3, 96)
    assert torch.equal(output_of(fresh["text"], batch), output_of(model["text"], batch))
    for name in ("other", "out"):
        assert torch.equal(fresh[name](x), model[name](x))
    assert engine.require_record(fresh).active == ("a", "b")
    assert lightning_peft.report(fresh) == lightning_peft.report(model)


def test_settings_that_name_layers_of_different_parts_are_restored_together() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict(
            {
                "a": nn.ModuleDict({"x": nn.Linear(8, 8), "head": nn.Linear(8, 2)}),
                "b": nn.ModuleDict({"y": nn.Linear(8, 8), "head": nn.Linear(8, 2)}),
            }
        )

    model = built(build, adapt=["a", "b"], target_modules=["x", "y"])
    torch.manual_seed(0)
    fresh = build()
    engine.inject_as_described(fresh, engine.describe(model))
    assert lightning_peft.report(fresh) == lightning_peft.report(model)


def test_restoring_needs_a_bare_module_with_the_right_parts() -> None:
    described = engine.describe(built(lambda: nn.ModuleDict({"model": stack()}), adapt="model"))
    with pytest.raises(LifecycleError, match="has adapters already"):
        engine.inject_as_described(built(stack), described)
    with pytest.raises(CheckpointError, match="adapts 'model', which Stack does not have"):
        engine.inject_as_described(stack(), described)
    wrong = nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(1, 1, 1))})
    with pytest.raises(CheckpointError, match="cannot be put on ModuleDict"):
        engine.inject_as_described(wrong, described)


def test_skipped_layers_stay_skipped_when_restored() -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["second"]
    )
    model = built(stack, quantization_config=config)
    torch.manual_seed(0)
    fresh = stack()
    engine.inject_as_described(fresh, stored(engine.describe(model)))
    assert engine.require_record(fresh).parts[""].quantized == ["first"]

"""LoftQ on a CPU, compared with PEFT's own code, in which only the device is exchanged."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from models import stack, tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layers
from peft.utils import loftq_utils
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.backends.registry import backend_for
from lightning_peft.engine.files.description import describe, inject_as_described
from lightning_peft.errors import BaseMismatchError, ConfigError, UnsupportedError

from .reference import injected, output_of, refused, relative_error

NF4 = engine.quantization_config()
TARGET = "model.layers.0.self_attn.q_proj"


def config(bits: int = 4, iterations: int = 1, **settings: Any) -> LoraConfig:
    wanted = {"loftq_bits": bits, "loftq_iter": iterations}
    # Rows of whole blocks: bitsandbytes misreads others on CPUs, where PEFT never computes this.
    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "gate_proj"], **settings}
    return engine.as_peft_config(
        {"peft_type": "LORA", "init_lora_weights": "loftq", "loftq_config": wanted, **fields}
    )


@pytest.fixture
def peft_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets PEFT compute LoftQ where it is."""
    made: dict[str, Any] = dict(vars(loftq_utils))
    source = inspect.getsource(loftq_utils.loftq_init)
    exec(source.replace('"cuda"', '"cpu"'), made)
    monkeypatch.setattr(peft_layers, "loftq_init", made["loftq_init"])


def steps(model: nn.Module, batch: Any) -> list[float]:
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = output_of(model, batch).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SCALED_BY_ONE = {"use_rslora": True, "lora_alpha": 2}


@pytest.mark.parametrize(
    ("bits", "iterations", "settings"),
    [(4, 1, {}), (4, 3, SCALED_BY_ONE), (8, 1, {}), (4, 1, {"use_dora": True})],
)
@pytest.mark.usefixtures("peft_on_cpu")
def test_ten_steps_on_a_dense_base_are_those_of_peft(
    bits: int, iterations: int, settings: dict[str, Any]
) -> None:
    base = tiny_llama()
    theirs = get_peft_model(copy.deepcopy(base), config(bits, iterations, **settings)).eval()
    mine = injected(copy.deepcopy(base), config(bits, iterations, **settings)).eval()
    name = f"base_model.model.{TARGET}"
    rewritten = theirs.get_submodule(name).base_layer.weight
    stored = mine.get_submodule(TARGET).weight.stored
    # PEFT's constant for 8 bits has four digits.
    torch.testing.assert_close(stored, rewritten, rtol=1e-4 if bits == 8 else 0, atol=0)
    assert not torch.equal(rewritten, base.get_submodule(TARGET).weight)
    batch = token_batch()
    torch.testing.assert_close(steps(mine, batch), steps(theirs, batch), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_codes_are_those_of_the_base_and_less_is_lost(build: Any, tmp_path: Path) -> None:
    base, batch = build(), token_batch()
    exact, errors, models = output_of(base, batch), {}, {}
    for name, wanted in (
        ("loftq", {"init_lora_weights": "loftq", "lora_alpha": 16}),
        ("plain", {}),
    ):
        models[name] = injected(copy.deepcopy(base), r=16, quantization_config=NF4, **wanted)
        errors[name] = relative_error(output_of(models[name], batch), exact)
    assert errors["loftq"] < 0.9 * errors["plain"]
    mine, plain = models["loftq"], models["plain"]
    for name, layer in engine.adapted_layers(mine).items():
        codes = [x._parameters["weight"] for x in (layer, plain.get_submodule(name))]
        backend = backend_for(NF4)
        assert torch.equal(*map(backend.dequantize, codes)), name

    # So a folder is for the base as it is, quantized or not.
    folder = lightning_peft.save_adapter(mine, tmp_path)
    other = copy.deepcopy(base)
    lightning_peft.load_adapter(other, folder, quantization_config=NF4)
    torch.testing.assert_close(output_of(other, batch), output_of(mine, batch))


@pytest.mark.parametrize("iterations", [1, 4])
def test_a_checkpoint_makes_the_same_base_again(iterations: int, tmp_path: Path) -> None:
    base, batch = tiny_llama(), token_batch()
    mine = injected(copy.deepcopy(base), config(4, iterations), quantization_config=NF4)
    again = copy.deepcopy(base)
    inject_as_described(again, describe(mine))
    engine.load_trainable_state_dict(again, engine.trainable_state_dict(mine))
    assert torch.equal(output_of(again, batch), output_of(mine, batch))
    described = describe(mine)
    described["parts"][""]["changed_base_sums"][3] += 1
    with pytest.raises(BaseMismatchError, match="rewrote the base in another way"):
        inject_as_described(copy.deepcopy(base), described)
    if iterations > 1:
        folder = lightning_peft.save_adapter(mine, tmp_path)
        with pytest.raises(UnsupportedError, match="what was quantized was the base less"):
            lightning_peft.load_adapter(copy.deepcopy(base), folder, quantization_config=NF4)


@pytest.mark.parametrize("settings", [{"lora_alpha": 16}, {"use_rslora": True}])
def test_it_starts_at_the_same_weights_whatever_the_scaling(settings: dict[str, Any]) -> None:
    base, batch = tiny_llama(), token_batch()
    one, other = (
        output_of(injected(copy.deepcopy(base), config(**given), quantization_config=NF4), batch)
        for given in ({}, settings)
    )
    torch.testing.assert_close(other, one)


def test_more_iterations_lose_less() -> None:
    base, batch = tiny_llama(), token_batch()
    exact = output_of(base, batch)
    errors = [
        relative_error(
            output_of(injected(copy.deepcopy(base), config(4, n), quantization_config=NF4), batch),
            exact,
        )
        for n in (1, 5)
    ]
    assert errors[1] < errors[0]


REFUSED = {
    "bits": (ConfigError, lambda: config(bits=3), "4 or 8 bits"),
    "lora_bias": (UnsupportedError, lambda: config(lora_bias=True), "is for plain LoRA"),
    "int8": (UnsupportedError, lambda: config(bits=8), "is not for a base of 4 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_work_are_refused(case: str) -> None:
    error, wanted, message = REFUSED[case]
    with refused(module := tiny_llama(), error, message):
        lightning_peft.inject(module, wanted(), quantization_config=NF4)


def test_convolutions_have_no_such_form() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "head": nn.Linear(4, 2)})
    with pytest.raises(UnsupportedError, match="is for linear layers"):
        lightning_peft.inject(model, config(target_modules=["conv"]))


@pytest.mark.gpu
def test_the_numbers_of_peft_on_a_gpu() -> None:
    base = stack().cuda()
    wanted = {"target_modules": ["first", "second"]}
    theirs = get_peft_model(copy.deepcopy(base), config(4, 2, **wanted))
    mine = injected(copy.deepcopy(base), config(4, 2, **wanted))
    x = torch.randn(16, 96, device="cuda")
    assert relative_error(output_of(mine, x), output_of(theirs, x)) < 1e-5

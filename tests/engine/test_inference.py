"""Layers made ready for generation: the same numbers, and what is stored as before, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine import inference
from lightning_peft.engine.backends.bnb4 import FourBit

from .reference import randomize

CONFIGS = {
    "dense": None,
    "nf4": engine.quantization_config(),
    "nf4 in float32": engine.quantization_config(bnb_4bit_compute_dtype=torch.float32),
    "fp4": engine.quantization_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "int8": engine.quantization_config(load_in_8bit=True),
}


def adapted(kind: str = "nf4", dtype: torch.dtype = torch.float32, model=None, **settings):
    """Returns a model with two random adapters, of different ranks, in eval mode."""
    model = (tiny_llama() if model is None else model).to(dtype)
    config = CONFIGS[kind]
    lora = {"lora_alpha": 12, "lora_dropout": 0.2, **settings}
    engine.inject(model, quantization_config=config, r=4, **lora)
    engine.inject(model, quantization_config=config, r=6, adapter_name="other", **lora)
    randomize(model)
    return model.eval()


def in_turn(model: nn.Module, batch: dict[str, Tensor], autocast: bool = False) -> list[Tensor]:
    """Returns the logits of each adapter and of the base; adapters are switched on the way."""
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in ("default", "other", ["default", "other"], "default"):
            lightning_peft.set_adapter(model, name)
            found.append(model(**batch).logits)
        with lightning_peft.disable_adapters(model):
            found.append(model(**batch).logits)
        found.append(model(**batch).logits)
    return found


def check_same(model: nn.Module, batch: dict[str, Tensor], autocast: bool = False) -> None:
    params = {name: (param, param.data_ptr()) for name, param in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = in_turn(model, batch, autocast)
    together = batch["input_ids"].numel() == 1 and expected[0].dtype == torch.bfloat16
    with engine.ready_for_inference(model):
        assert engine.inference_bytes(model) == 0
        # What gets the same input is known after the first pass.
        for _ in range(2):
            for one, other in zip(in_turn(model, batch, autocast), expected, strict=True):
                if together:
                    # One matrix for several layers: now and then a last bit differs.
                    torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
                else:
                    assert torch.equal(one, other)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    for name, param in model.named_parameters():
        assert param is params[name][0]
        assert param.data_ptr() == params[name][1]
    assert not any({"forward", "dense_copies"} & vars(layer).keys() for layer in model.modules())


# One row in a matrix of several layers; alone and cast; and several rows.
SLICE = [
    ("nf4", torch.bfloat16, False, 1),
    ("nf4", torch.float32, True, 1),
    ("nf4", torch.float32, False, 2),
]


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast", "rows"),
    [
        pytest.param(*case, marks=() if case in SLICE else pytest.mark.long)
        for case in itertools.product(
            CONFIGS, (torch.float32, torch.bfloat16), (False, True), (1, 2)
        )
    ],
    ids=str,
)
def test_logits_and_stored_values_are_the_same(kind, dtype, autocast, rows):
    check_same(adapted(kind, dtype), token_batch(rows, 1 if rows == 1 else 5), autocast)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tiny_gpt2, "nf4"),
        (lambda: tiny_llama(tied=True), "dense"),
        pytest.param(tiny_gpt2, "dense", marks=pytest.mark.long),
        pytest.param(lambda: tiny_llama(tied=True), "nf4", marks=pytest.mark.long),
    ],
)
def test_layers_with_a_bias_and_transposed_ones(make, kind):
    check_same(adapted(kind, torch.bfloat16, make()), token_batch(1, 1))


def test_some_layers_without_adapters():
    model = adapted("nf4", torch.bfloat16, target_modules=["q_proj", "v_proj", "down_proj"])
    check_same(model, token_batch(1, 1))
    needed = engine.inference_bytes(model)
    # Where there is no memory for copies, none are made further in either.
    with engine.ready_for_inference(model, copies=False), torch.no_grad():
        assert engine.inference_bytes(model) == 0
        with engine.ready_for_inference(model):
            model(**token_batch(1, 1))
            assert not any(getattr(layer, "dense_copies", None) for layer in model.modules())
    assert engine.inference_bytes(model) == needed > 0


def test_an_interruption_of_the_preparation_leaves_nothing_switched(monkeypatch):
    model = adapted("nf4")
    switched: list[nn.Module] = []

    def interrupted(self, layer, observer):
        switched.append(layer)
        if len(switched) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(inference._ReadyForward, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt), engine.ready_for_inference(model):
        pass
    assert len(switched) == 3
    assert not any({"forward", "dense_copies"} & vars(layer).keys() for layer in model.modules())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"peft_type": "IA3"}])
def test_other_methods_read_the_copies(settings):
    model = tiny_llama().bfloat16()
    config = {"peft_type": "LORA", "r": 4, **settings} if "use_dora" in settings else settings
    engine.inject(model, config, quantization_config=CONFIGS["nf4"])
    randomize(model)
    batch = token_batch()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        with engine.ready_for_inference(model):
            assert torch.equal(model(**batch).logits, expected)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Notes for each product of a group how many layers it is for."""
    sizes: list[int] = []
    outputs = inference._Product.outputs

    def noted(self, *args):
        sizes.append(len(self.sizes))
        return outputs(self, *args)

    monkeypatch.setattr(inference._Product, "outputs", noted)
    return sizes


def test_layers_of_one_input_are_one_product_and_weights_dequantized_once(products, monkeypatch):
    model, batch = adapted("nf4", torch.bfloat16), token_batch(1, 1)
    calls: list[int] = []
    dequantize = FourBit.dequantize

    def counted(self, stored, dtype=None):
        calls.append(id(stored))
        return dequantize(self, stored, dtype)

    monkeypatch.setattr(FourBit, "dequantize", counted)
    layers = [layer for layer in model.modules() if hasattr(layer, "dense_copy")]
    numbers = sum(layer.weight_info()[0].numel() for layer in layers)
    assert len(layers) == 14
    assert engine.inference_bytes(model) == 2 * numbers
    assert engine.inference_bytes(model, torch.float32) == 4 * numbers
    with engine.ready_for_inference(model), torch.no_grad():
        for _ in range(6):
            model(**batch)
    # Alone in the first pass, and into the matrix in the second one.
    assert sorted(calls.count(place) for place in set(calls)) == [2] * 14
    # q, k and v; the output projection; gate and up; down.
    assert products == ([3, 1, 2, 1] * 2 * 5)[:7] + [3, 1, 2, 1] * 2 * 4


class Crossing(nn.Module):
    """Layers that get one input now, and different ones another time, or change it on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, change: bool = False) -> Tensor:
        first = self.first(x)
        if change:
            x.mul_(2)
        return self.third(first + self.second(y))


def test_layers_whose_inputs_are_not_always_the_same(products):
    model = Crossing().bfloat16()
    engine.inject(model, r=2, target_modules=["first", "second", "third"])
    randomize(model)
    model.eval()
    x, y = torch.randn(2, 1, 16).bfloat16()
    with torch.no_grad():
        expected = [model(x, x), model(x, y), model(y, x)]
        changed = model(x2 := x.clone(), x2, True)
        with engine.ready_for_inference(model):
            for _ in range(3):
                torch.testing.assert_close(model(x, x), expected[0])
            assert 2 in products
            torch.testing.assert_close(model(x2 := x.clone(), x2, True), changed)
            products.clear()
            for _ in range(2):
                for result, pair in zip(expected, ((x, x), (x, y), (y, x)), strict=True):
                    torch.testing.assert_close(model(*pair), result)
            torch.testing.assert_close(model(x2 := x.clone(), x2, True), changed)
            assert set(products) == {1}


def test_where_gradients_are_wanted_layers_compute_as_usual():
    model, batch = adapted("nf4"), token_batch()
    expected = gradients(model, batch)
    with engine.ready_for_inference(model):
        with torch.no_grad():
            model(**batch)
            model(**batch)
        found = gradients(model, batch)
    assert len(found) > 10
    assert all(torch.equal(one, found[name]) for name, one in expected.items())


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).logits.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_what_is_learnt_between_two_generations_counts():
    model, batch = adapted("nf4"), token_batch(1, 1)
    for copies in (True, False):
        randomize(model)
        with torch.no_grad():
            expected = model(**batch).logits
            with engine.ready_for_inference(model, copies):
                assert all(torch.equal(model(**batch).logits, expected) for _ in range(3))

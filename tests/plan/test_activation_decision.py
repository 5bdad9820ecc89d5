"""``gradient_checkpointing="auto"``: activations kept or computed again, by the planner."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.plan import activation_decision, device_memory
from lightning_peft.plan.activation_decision import decide_activations, rough_activation_bytes
from lightning_peft.plan.batch_size import BatchSize, size_of, without_values
from lightning_peft.plan.device_memory import DeviceMemory, available_memory
from lightning_peft.plan.meta_copy import meta_copy
from lightning_peft.plan.prediction import predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import from_module

CONFIG = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SETTINGS = PlanSettings("lora", batch_size=4, device="cpu", gradient_checkpointing=False)


@pytest.fixture
def run():
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    engine.inject(model, r=4)
    ids = torch.zeros(4, 32, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def device(size):
    return DeviceMemory("a device", size, "cpu")


def test_the_planner_decides_at_85_percent_of_the_device(run, monkeypatch):
    monkeypatch.setattr(activation_decision, "NEGLIGIBLE", 0)
    needed = predict(from_module(*run), SETTINGS).high_bytes
    enough = decide_activations(*run, SETTINGS, device(int(needed / 0.85) + 1))
    assert not enough.recompute
    assert "within 85% of the 946 MB of a device" in enough.reason
    assert enough.room == pytest.approx(1.0, abs=1e-3)
    twice = decide_activations(*run, SETTINGS, device(2 * needed))
    assert not twice.recompute
    assert twice.room > 1.5
    short = decide_activations(*run, SETTINGS, device(int(needed / 0.85) - 2))
    assert short.recompute
    assert "takes up to 804 MB, more than 85%" in short.reason


def test_activations_that_hardly_count_need_no_plan(run, monkeypatch):
    monkeypatch.setattr(activation_decision, "predict", None)
    rough = rough_activation_bytes(run[0], size_of(*run))
    decision = decide_activations(*run, SETTINGS, device(100 * rough))
    assert not decision.recompute
    assert decision.reason.startswith("all activations take less than")
    assert decision.room == pytest.approx(30)


def test_the_rough_estimate_is_above_the_planners(run):
    kept = predict(from_module(*run), SETTINGS).trace.kept
    assert 2 * kept < rough_activation_bytes(run[0], size_of(*run)) < 50 * kept


def test_weights_count_where_activations_hardly_do(run, monkeypatch):
    rough = rough_activation_bytes(run[0], size_of(*run))
    trained = sum(param.numel() for param in run[0].parameters() if param.requires_grad)
    size = 10 * rough
    held = int(0.85 * size - rough - 12 * trained)
    fits = DeviceMemory("a device", size, "cpu", held)
    assert decide_activations(*run, SETTINGS, fits).room == pytest.approx(1, abs=0.001)
    # By the planner, which does not answer here.
    monkeypatch.setattr(activation_decision, "predict", None)
    assert decide_activations(*run, SETTINGS, replace(fits, held=held + rough // 10)).recompute


@dataclass(frozen=True)
class Sample:
    ids: torch.Tensor
    name: str = "one"


IDS = torch.zeros(2, 6, dtype=torch.long)
PIXELS = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (IDS, BatchSize(integers=12, longest=6)),
        (BatchEncoding({"input_ids": IDS, "attention_mask": IDS}), BatchSize(12, longest=6)),
        ({"input_ids": IDS, "labels": IDS[:, :1]}, BatchSize(14, longest=6)),
        ({"pixels": PIXELS, "ids": IDS, "scale": torch.tensor(2)}, BatchSize(12, 96, longest=6)),
        (Sample(IDS), BatchSize(12, characters=3, longest=6)),
        ([PIXELS, [PIXELS, 3, None]], BatchSize(floats=192, longest=4)),
        (["a text"] * 2, BatchSize(0, 0, 12, 6, "the batch has no tensors")),
        ({"ids": IDS, "graph": object()}, BatchSize(12, 0, 0, 6, "the batch holds a object")),
    ],
)
def test_sizes_of_batches(batch, size):
    assert size_of(nn.Linear(1, 1), batch) == size


def test_batches_lose_their_values_whatever_they_are():
    encoding = without_values(BatchEncoding({"input_ids": IDS}))
    assert type(encoding) is BatchEncoding
    assert encoding.input_ids.is_meta
    assert not IDS.is_meta
    sample, (inner,) = without_values((Sample(IDS), [{"a": IDS}]))
    assert (sample.ids.is_meta, sample.name, inner["a"].is_meta) == (True, "one", True)


def test_a_batch_that_cannot_be_looked_into_is_computed_again(run):
    decision = decide_activations(run[0], ["a text"] * 8, SETTINGS, device(10**12))
    assert decision.recompute
    assert decision.reason.endswith("activations is not known: the batch has no tensors")


def test_a_batch_encoding_is_planned(run, monkeypatch):
    monkeypatch.setattr(activation_decision, "NEGLIGIBLE", 0)
    batch = without_values(BatchEncoding(run[1]))
    assert decide_activations(run[0], batch, SETTINGS, device(10**10)).planned


def test_a_module_says_what_it_trains_on(run):
    model, batch = run
    model.activation_shapes = lambda given: [given["input_ids"]] * 3
    assert size_of(model, batch) == BatchSize(3 * 4 * 32, longest=32)
    model.activation_shapes = lambda given: given["images"]
    assert "activation_shapes of LlamaForCausalLM failed: Key" in size_of(model, batch).unknown


def test_what_cannot_be_predicted_is_computed_again(run, monkeypatch):
    monkeypatch.setattr(activation_decision, "NEGLIGIBLE", 0)
    _, batch = run

    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = LlamaForCausalLM(LlamaConfig(**CONFIG))

        def forward(self, input_ids, labels):
            return self.model(input_ids[input_ids.sum(1) >= 0], labels=labels).loss

    module = Sized()
    engine.inject(module, r=4)
    decision = decide_activations(module, batch, SETTINGS, device(10**12))
    assert decision.recompute
    assert decision.reason.startswith("the memory of the activations cannot be predicted: A train")


def test_datasets_of_a_module_are_not_copied():
    module = nn.Linear(2, 2)
    module.rows = TensorDataset(torch.zeros(3))
    assert meta_copy(module).rows is module.rows


class Distilled(nn.Module):
    """Learns from a teacher that it does not register, with random numbers of three libraries."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(600, 600)
        self._teacher = [nn.Linear(600, 600)]
        self._banks = {"large": torch.zeros(4, 600, 600), "small": torch.ones(3)}

    def training_step(self, batch, batch_idx):
        share = random.random() * np.random.rand() + sum(self._banks["small"].tolist())
        with torch.no_grad():
            wanted = self._teacher[0](batch) + self._banks["large"][0, 0]
        return share * (self.student(batch) - wanted).square().mean() * torch.rand(())


def test_large_tensors_that_are_not_registered_lose_their_values():
    module = Distilled()
    made = meta_copy(module)
    assert made._teacher[0].weight.is_meta
    assert made._teacher[0].weight.requires_grad
    assert made._banks["large"].is_meta
    assert torch.equal(made._banks["small"], torch.ones(3))
    assert torch.equal(made._teacher[0].bias, module._teacher[0].bias)
    plan = predict(from_module(module, torch.zeros(2, 600)), replace(SETTINGS, method="full"))
    assert plan.trace.trainable == 600 * 601


def test_a_plan_draws_no_random_numbers_of_the_run():
    source, draws = from_module(Distilled(), torch.zeros(2, 600)), []
    for planned in (False, True):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if planned:
            predict(source, replace(SETTINGS, method="full"))
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("version", [0, 1])
def test_the_limit_of_a_container_counts(version, tmp_path, monkeypatch):
    free = device_memory.psutil.virtual_memory().available
    monkeypatch.setattr(
        device_memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": free})
    )
    assert available_memory(tmp_path) == free
    most, used, stat, cached = device_memory._CONTAINER_FILES[version]
    (tmp_path / most).parent.mkdir(exist_ok=True)
    (tmp_path / used).write_text("700000")
    (tmp_path / stat).write_text(f"anon 5\n{cached} 300000\n")
    (tmp_path / most).write_text("max\n")
    assert available_memory(tmp_path) == free
    (tmp_path / most).write_text("1000000\n")
    assert available_memory(tmp_path) == 600_000

import logging
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plan.prediction import plan_memory, predict
from lightning_peft.plugin import plan_callback

CONFIG = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip


class Task(pl.LightningModule):
    fails = False

    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(**CONFIG))

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        if self.fails and batch_idx and not isinstance(loss, torch._subclasses.FakeTensor):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


def fit(strategy, task=None, **settings):
    ids = torch.zeros(3, 4, 64, dtype=torch.long)
    batches = [{"input_ids": one, "labels": one} for one in ids]
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        max_steps=2,
        callbacks=[plan_callback.MemoryPlanCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(task or Task(), DataLoader(batches, batch_size=None))


@pytest.fixture
def small_device(monkeypatch):
    small = DeviceMemory("a small device", 410_000_000, "cpu", 400_000_000)
    monkeypatch.setattr(plan_callback, "memory_of", lambda trainer, module: small)


@pytest.fixture
def always_planned(monkeypatch):
    monkeypatch.setattr(plan_callback, "surely_fits", lambda *given: False)


def test_nothing_is_said_of_a_run_that_fits(caplog):
    with caplog.at_level(logging.INFO):
        fit(QLoRAStrategy(announce=False))
    assert "memory" not in "".join(r.message for r in caplog.records if "plan" in r.name)


def test_what_fits_by_a_rough_estimate_is_not_planned(monkeypatch):
    monkeypatch.setattr(plan_callback, "predict", None)
    monkeypatch.setattr(plan_callback, "_planned", None)
    fit(LoRAStrategy(announce=False, gradient_checkpointing=True))


@pytest.mark.parametrize("strategy", ["auto", LoRAStrategy])
def test_a_run_that_does_not_fit_is_warned_of(small_device, strategy, caplog):
    with caplog.at_level(logging.INFO):
        fit(strategy if strategy == "auto" else strategy(announce=False))
    (warning,) = [r for r in caplog.records if r.name == plan_callback.__name__]
    assert warning.levelname == "WARNING"
    assert "will not fit" in warning.message
    assert "logits" in warning.message
    assert warning.message.count("saves about") == 3


def test_a_budget_is_planned_with(always_planned, monkeypatch):
    found = []
    original = plan_callback._planned
    monkeypatch.setattr(
        plan_callback, "_planned", lambda *g: found.append(original(*g)) or found[-1]
    )
    kept = {}
    for checkpointing in (False, 0.9, 0.5, True):
        fit(LoRAStrategy(announce=False, gradient_checkpointing=checkpointing))
        kept[checkpointing] = found.pop()[1].trace.kept
    assert kept[False] > kept[0.9] > kept[0.5] > kept[True]


def test_a_plan_of_the_running_module_is_that_of_the_config(always_planned, monkeypatch):
    found = []
    original = plan_callback._planned

    def noting(*arguments):
        found.append(original(*arguments))
        return found[-1]

    monkeypatch.setattr(plan_callback, "_planned", noting)
    for strategy, method in ((LoRAStrategy, "lora"), (QLoRAStrategy, "qlora")):
        for checkpointing in (False, True):
            fit(strategy(announce=False, gradient_checkpointing=checkpointing))
            wanted = plan_memory(
                LlamaConfig(**CONFIG), method=method, batch_size=4, seq_len=64, device="cpu",
                padded=False, gradient_checkpointing=checkpointing,
            )  # fmt: skip
            source, plan, _ = found.pop()
            if method == "lora":
                # What is there already can be planned with a 4-bit base.
                lora = (source, plan.settings)
            assert plan.trace.trainable == wanted.trace.trainable
            assert plan.trace.total == wanted.trace.total
            assert plan.allocated == pytest.approx(wanted.allocated, rel=0.01)
    source, settings = lora
    quantized = predict(source, replace(settings, method="qlora"))
    assert quantized.breakdown["weights_quantized"] == wanted.breakdown["weights_quantized"]
    assert quantized.allocated == pytest.approx(wanted.allocated, rel=0.01)


def test_out_of_memory_is_explained(small_device, caplog):
    task = Task()
    task.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        fit(LoRAStrategy(announce=False), task)
    message = [r.message for r in caplog.records if r.name == plan_callback.__name__][-1]
    assert message.startswith("Out of memory on a small device (410 MB)")
    assert "activations" in message
    assert "gradient_checkpointing=True: saves about" in message
    assert message.count("saves about") == 3


def test_what_cannot_be_planned_trains_all_the_same(always_planned, caplog):
    class Odd(Task):
        def training_step(self, batch, batch_idx):
            assert self.trainer.training
            return super().training_step(batch, batch_idx)

    with caplog.at_level(logging.INFO):
        fit(LoRAStrategy(announce=False), Odd())
    assert any("cannot be planned" in r.message for r in caplog.records)


def test_kinds_of_ends():
    assert plan_callback.is_out_of_memory(MemoryError())
    assert plan_callback.is_out_of_memory(
        RuntimeError("[enforce fail] not enough memory: you tried")
    )
    assert not plan_callback.is_out_of_memory(RuntimeError("shapes"))
    assert not plan_callback.is_out_of_memory(KeyboardInterrupt())

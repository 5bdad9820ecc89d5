import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from models import llama_config
from torch import nn
from transformers import LlamaForCausalLM

from lightning_peft import engine
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plan.memory_tracker import MemoryTracker
from lightning_peft.plan.prediction import plan_memory
from lightning_peft.plan.settings import PlanSettings


class Attending(pl.LightningModule):
    """torch's own attention, a convolution, batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 32, 3, padding=1)
        self.norm = nn.BatchNorm1d(32)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.norm(self.conv(x)).transpose(1, 2)
        loss = nn.functional.cross_entropy(self.head(self.encoder(x).mean(1)), y)
        self.log("loss", loss.item())
        return loss


def batch(rows=16):
    return torch.randn(rows, 8, 40), torch.zeros(rows, dtype=torch.long)


def really(module, batch, **injection):
    """The peak of the same step with real tensors, by the same ledger."""
    if injection:
        engine.inject(module, **injection)
    module.train()
    trained = [p for p in module.parameters() if p.requires_grad]
    tracker = MemoryTracker()
    tracker.enter(module.parameters(), "weights")
    tracker.enter(module.buffers(), "weights")
    for child in module.modules():
        state = getattr(child._parameters.get("weight"), "quant_state", None)
        if state is not None:
            inner = [state.state2.absmax, state.state2.code, state.offset]
            tracker.enter([state.absmax, state.code, *inner], "weights")
    tracker.hold("optimizer", 8 * sum(p.numel() for p in trained))
    for param in trained:
        param.grad = torch.zeros_like(param)
    tracker.enter([p.grad for p in trained], "gradients")
    tracker.enter(batch, "batch")
    with tracker:
        loss = engine.default_step(module, batch)
        for param in trained:
            param.grad = None
        loss.backward()
    return tracker.peak


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_step_without_values_takes_what_a_real_one_takes(method):
    module, sample = Attending(), batch()
    before = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    plan = plan_memory(module, sample, method=method, optimizer="adamw", device="cpu")
    assert torch.equal(torch.get_rng_state(), random)
    assert type(module.head) is nn.Linear
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    injection = {"full": {}, "lora": {"r": 16}, "qlora": {"r": 16}}[method]
    if method == "qlora":
        injection["quantization_config"] = engine.quantization_config()
    # Real layers also have kernels of their own, such as a code table that all share.
    assert plan.allocated == pytest.approx(really(module, sample, **injection), rel=0.02)


def test_more_rows_of_a_sample():
    module = Attending()
    small, large = (plan_memory(module, batch(rows), method="lora") for rows in (4, 64))
    assert plan_memory(module, batch(4), method="lora", batch_size=64).peak_bytes == (
        large.peak_bytes
    )
    assert large.trace.kept > 10 * small.trace.kept


def test_quantized_weights_to_the_byte():
    config = llama_config(
        vocab_size=64, hidden_size=96, intermediate_size=160, architectures=["LlamaForCausalLM"]
    )
    plan = plan_memory(config, method="qlora", lora={"r": 8})
    model = LlamaForCausalLM(config)
    report = engine.inject(model, r=8, quantization_config=engine.quantization_config())
    real = {}
    for child in model.modules():
        weight = child._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None:
            held = [weight, state.absmax, state.code, state.offset, state.state2.absmax]
            real[child] = sum(tensor.nbytes for tensor in [*held, state.state2.code])
    assert plan.breakdown["weights_quantized"] == sum(real.values())
    assert plan.trace.trainable == report.trainable_parameters
    assert plan.trace.total == report.total_parameters
    frozen = plan.breakdown["weights_quantized"] + plan.breakdown["weights_dense"]
    tables, buffers = 14 * 4 * 273, sum(buffer.nbytes for buffer in model.buffers())
    assert frozen == report.base_bytes + tables + buffers


def test_the_breakdown_adds_up():
    plan = plan_memory(Attending(), batch(), method="qlora")
    assert sum(plan.breakdown.values()) == plan.peak_bytes
    assert plan.low_bytes < plan.peak_bytes < plan.high_bytes
    assert plan.fits(plan.high_bytes)
    assert not plan.fits(plan.high_bytes - 1)


def test_what_cannot_be_planned_says_why():
    with pytest.raises(ConfigError, match="Pass one as `batch`"):
        plan_memory(Attending())
    with pytest.raises(ConfigError, match="no parameters yet"):
        plan_memory(nn.Identity(), batch())
    manual = Attending()
    manual.automatic_optimization = False
    with pytest.raises(ConfigError, match="no loss to plan with"):
        plan_memory(manual, batch(), method="lora")
    with pytest.raises(ConfigError) as caught:
        PlanSettings(method="loar", batch_size=0, precision="bf16", optimizer="adam8")
    assert all(word in str(caught.value) for word in ("loar", "batch_size=0", "bf16", "adam8"))


def test_sizes_that_depend_on_values_are_refused():
    def step(module, sample):
        # As many rows as there are values over zero.
        return module.head(torch.randn(9, 32)[torch.randn(9) > 0]).sum()

    with pytest.raises(UnsupportedError, match="its sizes depend on them"):
        plan_memory(Attending(), batch(), method="lora", step=step)


def test_the_users_trainer_is_not_copied():
    module = Attending()
    trainer = SimpleNamespace(__deepcopy__=None)
    module._trainer = trainer
    plan_memory(module, batch(), method="lora", step=lambda m, b: m.head(torch.ones(2, 32)).sum())
    assert module._trainer is trainer

"""Faults of bitsandbytes, seeded into bitsandbytes."""

import bitsandbytes as bnb
import pytest
import torch

from lightning_peft import engine
from lightning_peft.doctor.training import check_optimizer, check_quantized
from lightning_peft.engine.backends import base, bnb4
from lightning_peft.engine.layers import lora
from lightning_peft.engine.verification.result import Check

gpu = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
devices = pytest.mark.parametrize("device", ["cpu", gpu])


@devices
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_work_pass(bits, device):
    found = check_quantized(bits, device)
    assert found.status == "ok", found
    assert "9 checks" in found.detail
    assert bnb.__version__ in found.detail


@devices
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_that_work_pass(kind, device):
    found = check_optimizer(kind, device)
    assert found.status == "ok", found
    assert ("states are paged" in found.detail) == (kind[0] == "p" and device == "cuda")
    assert ("the CPU pages nothing" in found.detail) == (kind[0] == "p" and device == "cpu")


@pytest.mark.parametrize(
    ("bits", "owner", "function", "status"),
    [
        (4, bnb, "matmul_4bit", "failed"),
        (8, base.DequantizedMatmul, "apply", "warning"),
    ],
)
def test_a_product_that_loses_gradients_is_found(bits, owner, function, status, monkeypatch):
    monkeypatch.setattr(owner, function, torch.no_grad()(getattr(owner, function)))
    found = check_quantized(bits, "cpu")
    assert found.status == status
    assert "gradients pass through every quantized layer" in found.detail
    assert "python -m bitsandbytes" in found.remedy


def test_what_cannot_be_checked_is_not_a_failure(monkeypatch):
    real = engine.verify

    def verify(*arguments):
        found = real(*arguments)
        found.checks.append(Check("two steps are equal", None, "the kernels are not deterministic"))
        return found

    monkeypatch.setattr(engine, "verify", verify)
    assert check_quantized(4, "cpu").status == "ok"


def test_gradients_that_an_evaluation_pass_loses_are_found(monkeypatch):
    real, trained = bnb.matmul_4bit, []

    def until_evaluation(x, *arguments, **options):
        if torch.is_grad_enabled() and not trained:
            return real(x, *arguments, **options)
        trained.append(x)
        return real(x.detach(), *arguments, **options)

    monkeypatch.setattr(bnb, "matmul_4bit", until_evaluation)
    # A linear layer and its adapter in one step ask for no gradients of bitsandbytes.
    monkeypatch.setattr(lora, "fused_output", lambda *_: None)
    found = check_quantized(4, "cpu")
    assert found.status == "failed"
    assert "gradients are the same before and after an evaluation pass" in found.detail


def test_weights_that_come_back_wrong_are_found(monkeypatch):
    real = bnb4.dequantize_4bit
    monkeypatch.setattr(bnb4, "dequantize_4bit", lambda *given: real(*given) * 1.5)
    found = check_quantized(4, "cpu")
    assert found.status == "failed"
    assert "weights come back 0.5" in found.detail


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("adamw_8bit", bnb.optim.AdamW8bit), ("paged_adamw_32bit", bnb.optim.PagedAdamW32bit)],
)
def test_steps_that_do_nothing_are_found(kind, cls, monkeypatch):
    monkeypatch.setattr(cls, "update_step", lambda *given: None)
    found = check_optimizer(kind, "cpu")
    assert found.status == "warning"
    assert "1 off torch's AdamW, at most" in found.detail
    assert "optimizer=None" in found.remedy

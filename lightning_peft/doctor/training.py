"""bitsandbytes: forward, backward and optimizer steps of this package's layers."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.doctor import remedies
from lightning_peft.doctor.results import CheckResult, Status

# Rounding of normally distributed weights, relative to their size, is about 0.09 for NF4 and 0.004
# for int8.
_ROUNDING = {4: 0.15, 8: 0.02}
_FEATURES = 64
# bitsandbytes pages states from 100,000 elements on, and keeps small ones in 32 bits.
_SHAPE = (400, 400)
_STEPS = 3
_STEP_ERROR = 0.1


def small_network() -> nn.Module:
    """Returns two linear layers with a nonlinearity between them, the same ones each time."""
    torch.manual_seed(0)
    layers = (nn.Linear(_FEATURES, _FEATURES), nn.Tanh(), nn.Linear(_FEATURES, _FEATURES))
    return nn.Sequential(*layers)


def check_quantized(bits: int, device: str, network: nn.Module | None = None) -> CheckResult:
    """Quantizes a small network, adds LoRA and verifies it, gradients after evaluation included."""
    broken: Status = "failed" if bits == 4 else "warning"
    network = small_network() if network is None else network
    linear = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    before = {n: module.weight.detach().clone() for n, module in linear.items()}
    engine.inject(
        network,
        quantization_config=engine.quantization_config(load_in_8bit=bits == 8),
        target_modules=sorted(linear),
        r=4,
        device=device,
    )
    network.to(device)
    errors = []
    for n, exact in before.items():
        weight: torch.Tensor = network.get_submodule(n).weight  # type: ignore[assignment]
        errors.append(float((weight.detach().cpu().float() - exact).norm() / exact.norm()))
    kind = "NF4 with double quantization" if bits == 4 else "int8"
    detail = f"{version('bitsandbytes')}, {kind} on {device}: "
    if not max(errors) <= _ROUNDING[bits]:
        detail += f"weights come back {max(errors):.2g} off, at most {_ROUNDING[bits]} expected"
        return CheckResult(broken, detail, remedies.quantized(bits))
    torch.manual_seed(1)
    verification = engine.verify(network, torch.randn(8, _FEATURES, device=device))
    failed = [
        f"{check.name}: {check.detail}" for check in verification.checks if check.passed is False
    ]
    if failed:
        return CheckResult(broken, detail + "; ".join(failed), remedies.quantized(bits))
    detail += (
        f"weights {max(errors):.2g} off, gradients right before and after an evaluation pass "
        f"({len(verification.checks)} checks)"
    )
    return CheckResult("ok", detail)


def check_optimizer(kind: str, device: str) -> CheckResult:
    """Takes steps with an optimizer of bitsandbytes and compares them with torch's AdamW."""
    paged = kind.startswith("paged")
    torch.manual_seed(0)
    start, gradients = torch.randn(_SHAPE), torch.randn(_STEPS, *_SHAPE)
    moved = []
    for replaced in (False, True):
        param = nn.Parameter(start.to(device, copy=True))
        optimizer = torch.optim.AdamW([param], lr=1e-2)
        if replaced:
            engine.replace_optimizers([optimizer], kind)
        with warnings.catch_warnings():
            # bitsandbytes says that the CPU pages nothing, which the detail says as well.
            warnings.simplefilter("ignore")
            for gradient in gradients:
                param.grad = gradient.to(device)
                optimizer.step()
        moved.append(param.detach().cpu() - start)
    error = float((moved[1] - moved[0]).norm() / moved[0].norm())
    detail = f"{_STEPS} steps on {device}, {error:.2g} off torch's AdamW"
    if not error <= _STEP_ERROR:
        detail += f", at most {_STEP_ERROR} expected"
        return CheckResult("warning", detail, remedies.OWN_OPTIMIZER)
    if not paged:
        return CheckResult("ok", detail)
    if any(getattr(value, "is_paged", False) for value in optimizer.state[param].values()):
        return CheckResult("ok", f"{detail}; states are paged")
    if device == "cpu":
        return CheckResult("ok", f"{detail}; the CPU pages nothing: states stay in memory")
    detail += "; states are not paged, so they all stay on the GPU"
    return CheckResult("warning", detail, remedies.OWN_OPTIMIZER)

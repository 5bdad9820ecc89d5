"""Proof, on the user's own module and batch, that the adapters are where they should be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.engine.adapters import adapted_layers, disable_adapters
from lightning_peft.engine.fingerprint import checksum
from lightning_peft.engine.lora import LoraLayer
from lightning_peft.engine.record import require_record
from lightning_peft.errors import LifecycleError, itemize

Step = Callable[[nn.Module, Any], Tensor]


@dataclass
class Check:
    """One checked property.

    Attributes:
        name: The property.
        passed: Whether it holds; ``None`` where it cannot be checked now.
        detail: What was measured, or which layers fail.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass
class Verification:
    """The result of :func:`verify`.

    Attributes:
        checks: In the order in which they were made.
    """

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raises a LifecycleError that lists the failed checks, if there are any."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if check.passed is False]
        if failed:
            raise LifecycleError("The adapters would not train as they should:" + itemize(failed))

    def __str__(self) -> str:
        """Returns one line per check."""
        marks = {True: "ok  ", False: "FAIL", None: "--  "}
        return "\n".join(f"{marks[c.passed]} {c.name}: {c.detail}" for c in self.checks)


def verify(module: nn.Module, batch: Any, step: Step | None = None) -> Verification:
    """Checks adapters by running them: forward in eval and train mode, and real backward passes.

    Parameters, gradients, buffers, train modes and random state are put back afterwards.

    Args:
        module: A module with adapters.
        batch: One batch, on the module's device.
        step: ``step(module, batch)`` returns a scalar loss. By default ``training_step`` where the
            module has one, else the ``loss`` of the output, else the mean square of the output.

    Raises:
        LifecycleError: If the module has no adapters.
    """
    require_record(module)
    step = step or default_step
    result = Verification()
    with _restored(module):
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        before = {name: checksum(param.data) for name, param in frozen.items()}
        result.checks.append(_no_op_at_init(module, batch, step))
        result.checks.append(_gradients_reach(module, batch, step))
        changed = [n for n, p in frozen.items() if checksum(p.data) != before[n]]
        result.checks.append(
            Check(
                "base weights unchanged by forward and backward",
                not changed,
                f"changed: {', '.join(changed[:5])}" if changed else f"{len(frozen)} tensors",
            )
        )
    return result


def default_step(module: nn.Module, batch: Any) -> Tensor:
    """Returns a scalar loss of ``module`` on ``batch``; see :func:`verify`."""
    if hasattr(module, "training_step"):
        output = module.training_step(batch, 0)
    elif isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    elif getattr(output, "loss", None) is not None:
        output = output.loss
    elif getattr(output, "logits", None) is not None:
        output = output.logits
    loss: Tensor = output if output.ndim == 0 else output.float().pow(2).mean()
    return loss


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    grads = {name: param.grad for name, param in module.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    modes = {child: child.training for child in module.modules()}
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        for name, param in module.named_parameters():
            param.grad = grads[name]
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        for child, mode in modes.items():
            child.training = mode


def _loss_without_randomness(module: nn.Module, batch: Any, step: Step) -> Tensor:
    module.eval()
    with torch.no_grad():
        return step(module, copy.copy(batch)).detach()


def _no_op_at_init(module: nn.Module, batch: Any, step: Step) -> Check:
    name = "no effect before training"
    layers = [x for x in adapted_layers(module).values() if isinstance(x, LoraLayer)]
    fresh = layers and all(
        not layer.lora_B[a].weight.any() for layer in layers for a in layer.lora_adapters
    )
    if not fresh:
        return Check(name, None, "the adapters are trained, or of a kind that starts elsewhere")
    on = _loss_without_randomness(module, batch, step)
    with disable_adapters(module):
        off = _loss_without_randomness(module, batch, step)
    difference = (on - off).abs().item()
    return Check(name, difference == 0.0, f"loss differs by {difference:g} from the base's")


def _gradients_reach(module: nn.Module, batch: Any, step: Step) -> Check:
    """After an evaluation pass, with every factor non-zero, each adapter must get a gradient."""
    name = "gradients reach every adapter after an evaluation pass"
    _loss_without_randomness(module, batch, step)
    module.train()
    tensors = {n: p for n, p in _active_tensors(module).items() if p.requires_grad}
    values = {n: p.detach().clone() for n, p in tensors.items()}
    try:
        with torch.no_grad():
            for param in tensors.values():
                param.add_(torch.randn_like(param) * 1e-2)
        for param in module.parameters():
            param.grad = None
        step(module, copy.copy(batch)).backward()
        dead = [n for n, p in tensors.items() if p.grad is None or not p.grad.any()]
    finally:
        with torch.no_grad():
            for n, param in tensors.items():
                param.copy_(values[n])
    if not tensors:
        return Check(name, False, "no adapter requires gradients")
    return Check(name, not dead, f"none at: {', '.join(dead[:5])}" if dead else f"{len(tensors)}")


def _active_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}": param
        for prefix, layer in adapted_layers(module).items()
        for name, param in layer.named_parameters()
        if "base_layer." not in name and name not in ("weight", "bias")
    }

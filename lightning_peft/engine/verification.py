"""Proof, on the user's own module and batch, that the adapters are where they should be."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft.engine.adapters import (
    adapted_layers_of,
    adapter_parameters,
    disable_adapters,
    refuse_merged,
)
from lightning_peft.engine.fingerprint import checksum
from lightning_peft.engine.in_place import parameter
from lightning_peft.engine.lora import LoraLayer, without_adapters
from lightning_peft.engine.parts import inside
from lightning_peft.engine.quantized_layers import QuantizedLayer
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

    Trainable parameters, gradients, buffers, train modes and random states (Python, NumPy, torch)
    are put back afterwards.

    Args:
        module: A module with adapters.
        batch: One batch, on the module's device.
        step: ``step(module, batch)`` returns a scalar loss. By default ``training_step`` where the
            module has one, else the ``loss`` of the output, else the mean square of the output.

    Raises:
        LifecycleError: If the module has no adapters, or merged ones.
    """
    require_record(module)
    refuse_merged(module, "Checking")
    step = step or default_step
    with _restored(module):
        frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
        before = {name: checksum(param) for name, param in frozen.items()}
        _loss_in_eval(module, batch, step)
        checks = [
            _no_op_at_init(module, batch, step),
            _base_passes_gradients(module),
            _gradients_reach(module, batch, step),
        ]
        changed = [n for n, p in frozen.items() if checksum(p) != before[n]]
        detail = f"changed: {', '.join(changed[:5])}" if changed else f"{len(frozen)} tensors"
        checks.append(Check("base weights unchanged by all this", not changed, detail))
    return Verification(checks)


def default_step(module: nn.Module, batch: Any) -> Tensor:
    """Returns a scalar loss of ``module`` on ``batch``; see :func:`verify`."""
    training_step: Any = getattr(module, "training_step", None)
    if training_step is not None:
        output = training_step(batch, 0)
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
    grads = {param: param.grad for param in module.parameters()}
    values = {p: p.detach().clone() for p in module.parameters() if p.requires_grad}
    buffers = [
        (child._buffers, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    modes = {child: child.training for child in module.modules()}
    try:
        with same_randomness(module), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for param, value in values.items():
                param.copy_(value)
            for holder, name, buffer, before in buffers:
                holder[name] = buffer.copy_(before)
        for param, grad in grads.items():
            param.grad = grad
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def same_randomness(module: nn.Module) -> Iterator[None]:
    """Puts the random states back that the body changes; two bodies in a row draw the same."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _loss_in_eval(module: nn.Module, batch: Any, step: Step) -> Tensor:
    module.eval()
    with same_randomness(module), torch.no_grad():
        return step(module, copy.copy(batch)).detach()


def _no_op_at_init(module: nn.Module, batch: Any, step: Step) -> Check:
    name = "no effect before training"
    layers = adapted_layers_of(module, require_record(module)).values()
    fresh = all(isinstance(layer, LoraLayer) and layer.is_fresh() for layer in layers)
    if not fresh:
        return Check(name, None, "the adapters are trained, or of a kind that starts elsewhere")
    on = _loss_in_eval(module, batch, step)
    with disable_adapters(module):
        off = _loss_in_eval(module, batch, step)
    if not (on.isfinite() and off.isfinite()):
        return Check(name, None, f"the loss is {on.item():g} with and {off.item():g} without them")
    difference = (on - off).abs().item()
    return Check(name, difference == 0.0, f"loss differs by {difference:g} from the base's")


def _base_passes_gradients(module: nn.Module) -> Check:
    """Compares each quantized layer's input gradient with the one of its dequantized weight.

    Asking ``requires_grad`` would not do: bitsandbytes' repacked layers say yes and pass nothing
    on. And the gradients of adapters below hide it, since the adapter path beside the layer
    passes some.
    """
    name = "gradients pass through every quantized layer after an evaluation pass"
    layers = {n: x for n, x in module.named_modules() if isinstance(x, QuantizedLayer)}
    wrong = [layer_name for layer_name, layer in layers.items() if not _passes_gradient(layer)]
    if not layers:
        return Check(name, None, "no layer is quantized")
    return Check(
        name, not wrong, f"wrong at: {', '.join(wrong[:5])}" if wrong else f"{len(layers)}"
    )


def _passes_gradient(layer: Any) -> bool:
    with without_adapters(layer) if isinstance(layer, LoraLayer) else nullcontext():
        probe = layer.probe().requires_grad_(True)
        output = layer.forward(probe)
        direction = torch.randn_like(output)
        if not output.requires_grad:
            return False
        (found,) = torch.autograd.grad(output, probe, direction, allow_unused=True)
        (expected,) = torch.autograd.grad(layer.dense_output(probe), probe, direction.float())
    # Half-precision products lose a few per mille; a lost or mangled gradient is far off.
    if found is None:
        return False
    return bool((found.float() - expected.float()).norm() <= 0.05 * expected.float().norm())


def _gradients_reach(module: nn.Module, batch: Any, step: Step) -> Check:
    """After an evaluation pass, with every factor non-zero, each adapter must get a gradient.

    Where none arrives, the layer's own weight is asked for one: if it gets any, the module uses
    the weight without the adapter, and the adapter is dead. If not, the loss does not depend on
    the layer (it is not called, or fed with zeros), which is no fault of the adapter.
    """
    name = "gradients reach every adapter after an evaluation pass"
    module.train()
    tensors = _active_tensors(module)
    if not tensors:
        return Check(name, False, "no adapter requires gradients")
    with torch.no_grad():
        for param in tensors.values():
            param.add_(torch.randn_like(param) * 1e-2)
    silent = _without_gradient(module, batch, step, tensors)
    layers = adapted_layers_of(module, require_record(module))
    owners = {n: layer for n, layer in layers.items() if any(inside(s, [n]) for s in silent)}
    weights = {n: parameter(layer, "weight") for n, layer in owners.items()}
    weights = {n: weight for n, weight in weights.items() if weight.is_floating_point()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        unused = _without_gradient(module, batch, step, weights) if weights else []
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    dead = [n for n in weights if n not in unused]
    if dead:
        detail = f"{', '.join(dead[:5])}: the module uses the weight without calling the layer"
        return Check(name, False, f"none at {detail}")
    idle = f"; the loss does not depend on {', '.join(list(owners)[:5])}" if owners else ""
    return Check(name, len(silent) < len(tensors), f"{len(tensors) - len(silent)} tensors{idle}")


def _active_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        entry.qualified(name): param
        for entry in require_record(module).parts.values()
        for name, param in adapter_parameters(module.get_submodule(entry.name)).items()
        if param.requires_grad
    }


def _without_gradient(
    module: nn.Module, batch: Any, step: Step, tensors: Mapping[str, nn.Parameter]
) -> list[str]:
    for param in module.parameters():
        param.grad = None
    with same_randomness(module):
        step(module, copy.copy(batch)).backward()
    return [n for n, param in tensors.items() if param.grad is None or not param.grad.any()]

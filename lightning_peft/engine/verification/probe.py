"""Trial forward and backward passes that restore all state."""

from __future__ import annotations

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_peft.engine.freezing import set_training_mode
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.engine.record import require_record

Step = Callable[[nn.Module, Any], Tensor]

_OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
_HOOKS = frozenset(name for name in _OWN_ATTRIBUTES if "hooks" in name)
_CONTAINERS = (list, dict, set, deque)


class NoLossError(Exception):
    """The module gives no loss to run backward from; the message says why."""


def default_step(module: nn.Module, batch: Any) -> Tensor:
    """Returns a scalar loss of ``module`` on ``batch``; see :func:`lightning_peft.verify`."""
    training_step: Any = getattr(module, "training_step", None)
    if training_step is not None:
        output = _train(module, training_step, batch)
    elif isinstance(batch, Mapping):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
    if isinstance(output, Mapping) and output.get("loss") is not None:
        output = output["loss"]
    elif getattr(output, "loss", None) is not None:
        output = output.loss
    elif getattr(output, "logits", None) is not None:
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise NoLossError(f"the module returned {type(output).__name__} and no loss")
    return output if output.ndim == 0 else output.float().pow(2).mean()


def _train(module: Any, training_step: Callable[..., Any], batch: Any) -> Any:
    if getattr(module, "automatic_optimization", True) is False:
        raise NoLossError("training_step steps the optimizers itself (manual optimization)")
    takes = [
        p.kind is not inspect.Parameter.KEYWORD_ONLY
        for p in inspect.signature(training_step).parameters.values()
    ]
    arguments = (batch, 0)[: max(1, sum(takes))]
    try:
        with _no_logging(module):
            output = training_step(*arguments)
    except RuntimeError as error:
        if "is not attached to a `Trainer`" not in str(error):
            raise
        raise NoLossError("training_step uses self.trainer, and the module has none") from error
    if output is None:
        raise NoLossError("training_step returned None")
    return output


@contextmanager
def _no_logging(module: nn.Module) -> Iterator[None]:
    """Lightning refuses ``self.log`` outside its loops, and a probe is nothing to log."""
    names = ("log", "log_dict")
    logging = [vars(child) for child in module.modules() if hasattr(child, "log_dict")]
    before = [{name: own[name] for name in names if name in own} for own in logging]
    for own in logging:
        own.update(dict.fromkeys(names, _log_nothing))
    try:
        yield
    finally:
        for own, kept in zip(logging, before, strict=True):
            for name in names:
                del own[name]
            own.update(kept)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of ``self.log``."""


class ModuleProbe:
    """A module, a batch and a loss, to be run in train and in eval mode.

    In train mode it is as training leaves it; see
    :func:`lightning_peft.engine.set_training_mode`.
    """

    def __init__(self, module: nn.Module, batch: Any, step: Step) -> None:
        self.module, self.batch, self.step = module, batch, step
        self._modes = {child: child.training for child in module.modules()}
        self._buffers = {
            buffer: buffer.detach().clone() for buffer in module.buffers() if not buffer.is_meta
        }
        # Such as a momentum teacher that a training step updates.
        self._teacher = {
            param: param.detach().clone()
            for param in mutable_parameters(module).values()
            if not param.requires_grad
        }

    def set_train(self) -> None:
        """Puts the module into the mode in which it trains."""
        for child, mode in self._modes.items():
            child.training = mode
        set_training_mode(self.module)

    def evaluate(self, keep_buffers: bool = False) -> Tensor:
        """Returns the loss as a validation loop computes it.

        With ``keep_buffers``, buffers are as the previous pass left them, not as at the start.
        """
        if not keep_buffers:
            self._reset_buffers()
        self.module.eval()
        with torch.no_grad():
            loss = self._loss().detach()
        self._reset_teacher()
        return loss

    def gradients(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Returns the gradients of ``tensors`` in train mode, always from the same start."""
        self._reset_buffers()
        self.set_train()
        for param in self.module.parameters():
            param.grad = None
        loss = self._loss()
        if loss.requires_grad:
            loss.backward()
        self._reset_teacher()
        found = {name: tensor.grad for name, tensor in tensors.items()}
        for param in self.module.parameters():
            param.grad = None
        return found

    def _loss(self) -> Tensor:
        with same_randomness(self.module), _no_logging(self.module):
            return self.step(self.module, copy.copy(self.batch))

    @torch.no_grad()
    def _reset_buffers(self) -> None:
        for buffer, value in self._buffers.items():
            buffer.copy_(value)

    @torch.no_grad()
    def _reset_teacher(self) -> None:
        for param, value in self._teacher.items():
            param.copy_(value)


@contextmanager
def perturbed(module: nn.Module, tensors: Mapping[str, Tensor], seed: int = 0) -> Iterator[None]:
    """Within the body, ``tensors`` have other values: the same ones for the same seed."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        perturb(tensors, seed)
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                layer.clear_other_rows()
        yield
    finally:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])


@torch.no_grad()
def perturb(tensors: Mapping[str, Tensor], seed: int) -> None:
    """Adds small random numbers to ``tensors``, so that no low-rank factor is zero."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=draw) * 1e-2
        tensor.add_(noise.to(tensor.device, tensor.dtype))


@contextmanager
def same_randomness(module: nn.Module) -> Iterator[None]:
    """Lets each body draw the same random numbers, and puts the random states back."""
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with preserved_randomness(devices):
        generators = [torch.cuda.default_generators[index] for index in devices]
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        yield


@contextmanager
def preserved_randomness(devices: Sequence[int] = ()) -> Iterator[None]:
    """Puts back the random states of Python, NumPy and torch, also those of GPUs ``devices``."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def mutable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that training may change, by name.

    Everything but the frozen base: also what has no gradients, as in a momentum teacher.
    """
    frozen = require_record(module).frozen
    return {n: p for n, p in module.named_parameters() if p.requires_grad or n not in frozen}


@contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Puts back what running the module changes.

    Values outside the frozen base, gradients and their flags, buffers, modes, random states, and
    the plain attributes of all submodules, where modules keep counters, caches and metrics; and
    hooks, which some models register in their first pass, with an attribute that says so.
    """
    grads = {param: (param.grad, param.requires_grad) for param in module.parameters()}
    values = {p: p.detach().clone() for p in mutable_parameters(module).values()}
    buffers = [
        (child._buffers, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    modes = {child: child.training for child in module.modules()}
    attributes = {child: _attributes(child) for child in module.modules()}
    try:
        with same_randomness(module), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for param, value in values.items():
                param.copy_(value)
            for holder, name, buffer, before in buffers:
                holder[name] = buffer.copy_(before)
        for param, (grad, required) in grads.items():
            param.grad = grad
            if param.requires_grad != required:
                param.requires_grad_(required)
        for child, mode in modes.items():
            child.training = mode
        for child, kept in attributes.items():
            _put_back(child, kept)


def _attributes(child: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns each attribute with a copy of its contents, where it is a tensor or container."""
    kept: dict[str, tuple[Any, Any]] = {}
    for name, value in vars(child).items():
        if name in _HOOKS:
            kept[name] = value, dict(value)
        if name in _OWN_ATTRIBUTES:
            continue
        if type(value) is Tensor:
            kept[name] = value, value.detach().clone()
        else:
            kept[name] = value, copy.copy(value) if type(value) in _CONTAINERS else None
    return kept


def _put_back(child: nn.Module, kept: Mapping[str, tuple[Any, Any]]) -> None:
    now = vars(child)
    for name in [name for name in now if name not in kept and name not in _OWN_ATTRIBUTES]:
        del now[name]
    for name, (value, content) in kept.items():
        now[name] = value
        if isinstance(content, Tensor):
            if not torch.equal(value, content):
                value.data.copy_(content)
        elif isinstance(content, (dict, set)):
            value.clear()
            value.update(content)
        elif content is not None:
            value.clear()
            value.extend(content)

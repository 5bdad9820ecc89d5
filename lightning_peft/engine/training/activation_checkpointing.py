"""Activation checkpointing of repeated blocks.

torch's non-reentrant checkpoint does the work. What it misses is handled here: buffers that
a block changes, train and eval modes, and devices of tensors that are not positional arguments.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lightning_peft.compat.torch import (
    disable_compile,
    is_compiled,
    saved_tensors_hooks_in_use,
    tree_flatten,
    tree_unflatten,
    version_of,
)
from lightning_peft.compat.transformers import CHECKPOINT_FUNCTION, GradientCheckpointingLayer
from lightning_peft.engine.adapters import adapted_layers
from lightning_peft.engine.layers.mixin import DynamicMixin, add_mixin, class_key, remove_mixin
from lightning_peft.engine.record import require_record
from lightning_peft.engine.training.activation_budget import ActivationBudget, read_budget
from lightning_peft.engine.training.blocks import repeated_blocks
from lightning_peft.errors import UnsupportedError

# Elements up to which a buffer is always kept: batch norm changes its own without a trace.
_SMALL = 1 << 16
_FLAGS = ("gradient_checkpointing", "grad_checkpointing")
_ABSENT = object()
_BUDGET = "_activation_budget"
_CACHE = "use_cache"


@dataclass
class Checkpointing:
    """What was switched on, and how to switch it off.

    Attributes:
        descriptions: What is checkpointed, one phrase for each part; empty where nothing is.
        blocks: Blocks whose class was extended.
        attributes: Objects with a name and the value it had in their ``__dict__`` before.
    """

    descriptions: list[str] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute until :meth:`disable`."""
        self.attributes.append((owner, name, owner.__dict__.get(name, _ABSENT)))
        setattr(owner, name, value)

    def keep_all(self) -> None:
        """Lets blocks keep everything again; caches stay off, so the numbers are the same."""
        caches = [held for held in self.attributes if held[1] == _CACHE]
        self.attributes = [held for held in self.attributes if held[1] != _CACHE]
        self.disable()
        self.attributes = caches

    def disable(self) -> None:
        """Puts every class and attribute back."""
        while self.blocks:
            remove_mixin(self.blocks.pop(), CheckpointedBlock)
        while self.attributes:
            owner, name, before = self.attributes.pop()
            if before is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, before)


def checkpoint_activations(
    module: nn.Module, setting: bool | float | str, notify: Callable[[str], None] | None = None
) -> Checkpointing:
    """Switches activation checkpointing on in the adapted parts of ``module``.

    In transformers models by their own switch, with the key-value cache off; elsewhere around each
    of the repeated blocks that hold adapters: two or more of one class in a ``ModuleList``,
    ``Sequential`` or ``ModuleDict``. Where the user switched it on already, nothing is changed.

    Args:
        module: A module with adapters.
        setting: ``True``, ``False``, ``"auto"`` for where there is something to checkpoint, or what
            the blocks may keep: an amount such as ``"2GB"``, or a share such as ``0.5``.
        notify: Shows a line to the user, such as what is kept under a budget.

    Returns:
        What was done and its inverse.
    """
    budget = None if read_budget(setting) is None else ActivationBudget(setting, notify)
    done = Checkpointing()
    if setting is False:
        return done
    record = require_record(module)
    for name in record.parts:
        part, label = module.get_submodule(name), name or type(module).__name__
        on = [m for m in part.modules() if any(getattr(m, flag, False) is True for flag in _FLAGS)]
        if on and budget is not None:
            raise UnsupportedError(
                f"gradient_checkpointing={setting!r}: {label} keeps the inputs of its blocks only, "
                "by your own switch, so there is nothing to decide. Remove one of the two."
            )
        if on:
            done.descriptions.append(f"{label} does it already, by your own switch")
            continue
        library = _enable_in_transformers(part, done, budget)
        own = repeated_blocks(part)
        for block in own:
            add_mixin(block, CheckpointedBlock)
            done.blocks.append(block)
            done.set(block, _BUDGET, budget)
        counts = Counter(class_key(block)[2].__name__ for block in [*library, *own])
        if counts:
            blocks = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            compiled = any(map(is_compiled, [*library, *own]))
            eager = ", without their torch.compile" if compiled else ""
            done.descriptions.append(f"{blocks} of {label}{eager}")
    if not done.descriptions and setting != "auto":
        raise UnsupportedError(
            f"gradient_checkpointing={setting!r}: no block repeats in "
            f"{', '.join(name or type(module).__name__ for name in record.parts)}. Two or more "
            "modules of one class that hold adapters, in one ModuleList or Sequential, are "
            "needed, or a transformers model that supports it. Use 'auto' or False, or call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) in your own forward."
        )
    return done


def is_checkpointed(module: nn.Module) -> bool:
    """Whether some block of ``module`` is checkpointed, by this package or its own switch."""
    return any(
        isinstance(child, CheckpointedBlock)
        or any(getattr(child, flag, False) is True for flag in _FLAGS)
        for child in module.modules()
    )


def has_activation_budget(module: nn.Module) -> bool:
    """Whether some block of ``module`` keeps what a budget allows, once it has measured."""
    functions = (child.__dict__.get(CHECKPOINT_FUNCTION) for child in module.modules())
    return any(
        isinstance(function, functools.partial)
        and any(isinstance(argument, ActivationBudget) for argument in function.args)
        for function in functions
    ) or any(child.__dict__.get(_BUDGET) is not None for child in module.modules())


def _enable_in_transformers(
    part: nn.Module, done: Checkpointing, budget: ActivationBudget | None
) -> list[nn.Module]:
    """Does what ``gradient_checkpointing_enable`` does, without its hooks on the embeddings.

    Those let gradients flow into frozen layers, which only reentrant checkpointing needs.
    """
    adapted = {id(layer) for layer in adapted_layers(part).values()}
    models = [
        m
        for m in part.modules()
        if isinstance(m, PreTrainedModel) and any(id(child) in adapted for child in m.modules())
    ]
    refusing = [m for m in models if not m.supports_gradient_checkpointing]
    inside = {id(child) for model in models for child in model.modules()}
    inside -= {id(child) for model in refusing for child in model.modules()}
    switched: list[nn.Module] = []
    for child in part.modules():
        known = isinstance(child, GradientCheckpointingLayer) or id(child) in inside
        if known and hasattr(child, "gradient_checkpointing"):
            done.set(child, "gradient_checkpointing", True)
            done.set(child, CHECKPOINT_FUNCTION, functools.partial(run_checkpointed, budget))
            switched.append(child)
    configs = {id(m.config): m.config for m in part.modules() if hasattr(m, "config")}
    for config in configs.values():
        if switched and getattr(config, _CACHE, None) is True:
            done.set(config, _CACHE, False)
    layers: list[nn.Module] = [m for m in switched if isinstance(m, GradientCheckpointingLayer)]
    return layers or switched


class CheckpointedBlock(DynamicMixin):
    """Keeps the inputs of a block, and computes its activations again in backward."""

    label = "Checkpointed"

    # Within a compiled module the blocks run eagerly.
    @disable_compile
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes as the block does; in training, only its inputs are kept for backward."""
        block: Any = self
        forward: Any = super().forward  # type: ignore[misc]
        if not block.training or not _should_checkpoint():
            return forward(*args, **kwargs)
        return _run(block.__dict__.get(_BUDGET), block, forward, args, kwargs)


@disable_compile
def run_checkpointed(
    budget: ActivationBudget | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Checkpoints a call the way transformers models ask for it.

    ``function`` is a bound method of the block, or a partial whose first argument is the block.
    """
    if not _should_checkpoint():
        return function(*args, **kwargs)
    owner = getattr(function, "__self__", None)
    if isinstance(function, functools.partial):
        owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
        kwargs = {**function.keywords, **kwargs}
        function = functools.partial(function.func, *function.args)
    return _run(budget, owner, function, args, kwargs)


def _run(
    budget: ActivationBudget | None,
    block: Any,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    block = block if isinstance(block, nn.Module) else nn.Module()
    if budget is None:
        return _checkpointed(block, forward, args, kwargs)
    return budget.run(block, forward, args, kwargs, _checkpointed)


def _should_checkpoint() -> bool:
    """Whether activations would be kept: not without gradients, nor where others do this."""
    if not torch.is_grad_enabled():
        return False
    hooks = saved_tensors_hooks_in_use()
    return hooks is None or getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint"


def _checkpointed(
    block: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kept: tuple[Any, AbstractContextManager[None] | None] = (None, None),
) -> Any:
    """Calls a block so that its inputs are kept only, and ``kept[0]`` as long as they are."""
    # Every tensor is positional for checkpoint: it looks there only for the devices whose random
    # state it keeps, and for tensors that are changed in place before backward.
    leaves, structure = tree_flatten((args, kwargs))
    given = [(args, kwargs)]

    def call(*leaves: Any) -> Any:
        # The first time with the user's own lists and dictionaries, which the block may fill.
        own_args, own_kwargs = given.pop() if given else tree_unflatten(list(leaves), structure)
        return forward(*own_args, **own_kwargs)

    state = _BlockState(block, kept[0])
    noted = _ForwardContext(state, kept[1] or nullcontext())
    return checkpoint(
        call, *leaves, use_reentrant=False, context_fn=lambda: (noted, _RecomputeContext(state))
    )


class _BlockState:
    """What a block was like when its forward pass began."""

    def __init__(self, block: nn.Module, companion: Any) -> None:
        self.companion = companion
        self.modules = _modules_of(block)
        self.modes: list[bool] = []
        self.buffers: list[tuple[nn.Module, str, Tensor | None]] = []


def _modules_of(block: nn.Module) -> list[nn.Module]:
    """Returns all modules inside a block, itself included, each once, as ``modules()`` does.

    That makes a call of Python for each and its depth: a third of all calls of a step.
    """
    waiting: list[nn.Module | None] = [block]
    found: dict[int, nn.Module] = {}
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            waiting += module._modules.values()
    return list(found.values())


class _ForwardContext:
    """Around the forward pass: notes the modes, and the buffers that may be changed in it."""

    def __init__(self, state: _BlockState, inner: AbstractContextManager[None]) -> None:
        self.state, self.inner = state, inner
        self.before: list[tuple[nn.Module, str, Any, Any, int]] = []

    def __enter__(self) -> None:
        self.state.modes = [module.training for module in self.state.modules]
        self.before = [
            (module, name, buffer, None if buffer is None else buffer.clone(), version_of(buffer))
            for module in self.state.modules
            if module._buffers
            for name, buffer in module._buffers.items()
        ]
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.state.buffers = [
            (module, name, copy)
            for module, name, buffer, copy, version in self.before
            if module._buffers.get(name) is not buffer
            or version_of(buffer) != version
            or (buffer is not None and buffer.numel() <= _SMALL)
        ]
        self.before = []


class _RecomputeContext:
    """Around the computation in backward: modes and buffers are what they were; then as now."""

    def __init__(self, state: _BlockState) -> None:
        self.state = state
        self.now: list[tuple[nn.Module, bool]] = []
        self.buffers: list[tuple[nn.Module, str, Any]] = []

    def __enter__(self) -> None:
        for module, mode in zip(self.state.modules, self.state.modes, strict=True):
            # Rarely: setting an attribute of a module is slow.
            if module.training is not mode:
                self.now.append((module, module.training))
                module.training = mode
        self.buffers = [(m, name, m._buffers[name]) for m, name, _ in self.state.buffers]
        for module, name, copy in self.state.buffers:
            # A copy again: backward may come a second time.
            module._buffers[name] = None if copy is None else copy.clone()

    def __exit__(self, *error: object) -> None:
        for module, name, buffer in self.buffers:
            module._buffers[name] = buffer
        for module, mode in self.now:
            module.training = mode
        self.now, self.buffers = [], []

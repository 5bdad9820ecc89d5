"""Parameter groups of optimizers, with adapters in place of frozen weights.

An optimizer that was made before the adapters, as LightningCLI and many constructors do, holds the
base weights that its user wanted to train. What trains for such a weight are the adapters of its
layer, so they take its place, in its parameter group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_peft.compat.torch import forget_parameter_count
from lightning_peft.engine.adapters import (
    activate,
    adapted_layers_of,
    adapter_parameters,
)
from lightning_peft.engine.backends.conversion import layer_of_dense_weight, release_freed_memory
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.record import adapted_parts, require_record
from lightning_peft.errors import LifecycleError


def add_adapters_to_optimizers(
    module: nn.Module, optimizers: Iterable[Any], others: Iterable[Any] = ()
) -> list[str]:
    """Puts the adapters into optimizers that hold the weights below them and not the adapters.

    Groups stay the same objects with their hyperparameters, and schedulers keep them. Dense weights
    that were quantized since leave, and nothing keeps them in memory any more. Other frozen weights
    leave only where an optimizer may touch parameters that have no gradient: LBFGS, and every class
    that is not torch's or bitsandbytes' own. A group that gets empty stays.

    Args:
        module: The user's module, with adapters.
        optimizers: The optimizers that are to train it.
        others: Optimizers that the module keeps besides, and may step; what cannot be changed of
            them is left.

    Returns:
        What was done, one sentence for each optimizer that got adapters.

    Raises:
        LifecycleError: If an optimizer of a class of its own keeps lists of tensors besides its
            groups, which would not fit them any more; or made states for the weights in its
            constructor, and makes none for the adapters now.
    """
    kept = [*optimizers, *(optimizer for optimizer in others if not _has_own_tensors(optimizer))]
    exchange = _Exchange(module, held_ids(kept))
    notes = [exchange.apply(index, optimizer) for index, optimizer in enumerate(kept)]
    if exchange.freed:
        release_freed_memory()
    return [note for note in notes if note]


def optimizers_of(module: nn.Module) -> list[Any]:
    """Returns the torch optimizers that are attributes of ``module`` or of a submodule.

    Those in a list, tuple or dictionary are found too.
    """
    found = {
        id(one): one
        for child in module.modules()
        for value in list(vars(child).values())
        for one in _items(value)
        if isinstance(one, torch.optim.Optimizer)
    }
    return list(found.values())


def freeze_unoptimized(module: nn.Module, held: Collection[int], freeze: bool = True) -> list[str]:
    """Freezes the adapters of layers of which the optimizers hold nothing, if they name layers.

    They do where they hold the frozen weights of other adapted layers with their adapters: then
    ``configure_optimizers`` listed submodules, and left these out. A list of adapters alone, or of
    weights without their adapters, does not show that.

    Args:
        module: The user's module, with adapters.
        held: The ids of all parameters in optimizers.
        freeze: Whether to freeze them too. Not where several processes train: they have agreed on
            what has gradients by then.

    Returns:
        The names of these layers, such as those of an unused network.
    """
    record = require_record(module)
    listed, unoptimized = False, {}
    for name, layer in adapted_layers_of(module).items():
        own = adapter_parameters(layer)
        adapters = [param for param in own.values() if param.requires_grad]
        # One weight, or several in a recurrent layer.
        base = any(
            id(param) in held and "weight" in key.rpartition(".")[2]
            for key, param in layer.named_parameters()
            if key not in own
        )
        found = [id(param) in held for param in adapters]
        listed = listed or (base and bool(found) and all(found))
        if adapters and not base and not any(found):
            unoptimized[name] = adapters
    if not listed:
        return []
    for param in (param for adapters in unoptimized.values() for param in adapters if freeze):
        param.requires_grad_(False)
    record.unoptimized = list(unoptimized)
    return record.unoptimized


def unfreeze_unoptimized(module: nn.Module) -> None:
    """Undoes :func:`freeze_unoptimized` before a fit whose optimizers may hold other layers."""
    record = require_record(module)
    if record.unoptimized:
        record.unoptimized = []
        for _, part in adapted_parts(module):
            activate(part, record.active)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value


def held_parameters(optimizer: Any) -> list[torch.Tensor]:
    """Returns the parameters in all groups of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def held_ids(optimizers: Iterable[Any]) -> set[int]:
    """Returns the ids of all parameters in optimizers."""
    return {id(param) for optimizer in optimizers for param in held_parameters(optimizer)}


def _is_known(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith(("torch.optim.", "bitsandbytes."))


def steps_by_tensor(optimizer: Any) -> bool:
    """Whether an optimizer keeps no more than a state for each tensor that has a gradient."""
    return _is_known(optimizer) and not isinstance(optimizer, torch.optim.LBFGS)


def _has_own_tensors(optimizer: Any) -> bool:
    """Whether an optimizer has tensors of its own besides groups and states.

    Such as the slow weights of Lookahead, in lists that go with the groups, one flat buffer for all
    parameters, or another optimizer that has other groups.
    """
    if _is_known(optimizer):
        return False
    shared = {id(group["params"]) for group in optimizer.param_groups}
    return any(
        _has_tensors(value, shared)
        for name, value in getattr(optimizer, "__dict__", {}).items()
        if name not in ("param_groups", "state", "defaults")
    )


def _has_tensors(value: Any, shared: set[int]) -> bool:
    if id(value) in shared:
        return False
    if isinstance(value, torch.Tensor):
        return value.numel() > 1
    if isinstance(value, torch.optim.Optimizer):
        return any(id(group["params"]) not in shared for group in value.param_groups)
    if isinstance(value, (list, tuple, dict)):
        return any(_has_tensors(one, shared) for one in _items(value))
    return False


class _Exchange:
    """Adapters for the weights of one module.

    Attributes:
        freed: Whether a dense weight left an optimizer.
    """

    def __init__(self, module: nn.Module, held: set[int]) -> None:
        record = require_record(module)
        self.names = {id(param): name for name, param in module.named_parameters()}
        params = dict(module.named_parameters(remove_duplicate=False))
        self.frozen = {id(params[name]) for name in record.frozen if name in params}
        self.held = held
        self.freed = False
        self.adapters: dict[int, list[nn.Parameter]] = {}
        for layer in adapted_layers_of(module).values():
            own = adapter_parameters(layer).values()
            mine = {id(param) for param in own}
            for weight in layer.parameters():
                if id(weight) not in mine and weight.ndim > 1:
                    trained = [param for param in own if param.requires_grad]
                    self.adapters.setdefault(id(weight), []).extend(trained)

    def apply(self, index: int, optimizer: Any) -> str | None:
        """Changes the groups of one optimizer; returns a description if adapters were added."""
        weights = 0
        if _has_own_tensors(optimizer):
            self._refuse(optimizer)
            return None
        for group in optimizer.param_groups:
            before = list(group["params"])
            names = group.get("param_names", [None] * len(before))
            now: list[tuple[Any, Any]] = []
            added: list[nn.Parameter] = []
            for param, name in zip(before, names, strict=True):
                taken = self._adapters_for(param)
                weights += bool(taken)
                added += taken
                now += [(one, self.names[id(one)]) for one in taken]
                if not taken and self._is_kept(param, optimizer):
                    now.append((param, name))
            if len(now) == len(before) and not added:
                continue
            removed = [param for param in before if all(param is not one for one, _ in now)]
            states = _states(optimizer, group, removed, added)
            for param in removed:
                optimizer.state.pop(param, None)
                self.freed |= layer_of_dense_weight(param) is not None
            optimizer.state.update(states)
            # In place: LBFGS and wrappers of optimizers hold the same list.
            group["params"][:] = [param for param, _ in now]
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in now]
            if isinstance(optimizer, torch.optim.LBFGS):
                forget_parameter_count(optimizer)
        if not weights:
            return None
        return (
            f"optimizer {index} ({type(optimizer).__name__}) held {weights} frozen weights; the "
            "adapters on them train in their place"
        )

    def _refuse(self, optimizer: Any) -> None:
        """Raises if parameters would have to leave ``optimizer``, or to come in."""
        for param in held_parameters(optimizer):
            codes = id(param) in self.frozen and not param.is_floating_point()
            if codes or layer_of_dense_weight(param) is not None or self._adapters_for(param):
                raise LifecycleError(
                    f"{type(optimizer).__name__} holds weights of the frozen base, and they cannot "
                    "leave it: it keeps tensors of its own that go with its parameters. Make it "
                    "inside configure_optimizers, of the parameters that train: "
                    "[p for p in self.parameters() if p.requires_grad]."
                )

    def _adapters_for(self, param: torch.Tensor) -> list[nn.Parameter]:
        """Returns the adapters that stand for a frozen weight and are in no optimizer yet."""
        layer = layer_of_dense_weight(param)
        stored = param if layer is None else stored_parameter(layer)
        if layer is None and id(param) not in self.frozen:
            return []
        free = [one for one in self.adapters.get(id(stored), []) if id(one) not in self.held]
        self.held |= {id(one) for one in free}
        return free

    def _is_kept(self, param: torch.Tensor, optimizer: Any) -> bool:
        if layer_of_dense_weight(param) is not None:
            return False
        # Others may touch parameters that have no gradient.
        return steps_by_tensor(optimizer) or id(param) not in self.frozen


def _states(
    optimizer: Any, group: dict[str, Any], removed: list[Any], added: list[nn.Parameter]
) -> dict[Any, Any]:
    """States that the constructor of ``optimizer`` makes for new parameters, as Adagrad's does."""
    if not added or not any(optimizer.state.get(param) for param in removed):
        return {}
    settings = {key: value for key, value in group.items() if key != "param_names"}
    try:
        donor = type(optimizer)([{**settings, "params": added}])
    except Exception as error:
        raise LifecycleError(
            f"{type(optimizer).__name__} made states for the base weights before there were "
            f"adapters, and none can be made for the adapters now ({error}). Make it inside "
            "configure_optimizers."
        ) from error
    return {param: donor.state[param] for param in added if donor.state.get(param)}

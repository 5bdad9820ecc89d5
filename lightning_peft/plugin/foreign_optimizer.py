"""Conversion of optimizer states from other programs' checkpoints.

The file has them by number: in the order in which the old optimizer took its parameters, which it
does not name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.errors import first_line


def optimizer_states(
    module: Any, checkpoint: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[list[Any] | None, str, list[str] | None]:
    """Returns the states for the optimizers of the module as it is now, or why there are none.

    Returns:
        The states or ``None``; ``"restored"`` or the reason; the names of the optimizers.
    """
    old = checkpoint.get("optimizer_states")
    if not old:
        return None, "not in the file", None
    try:
        optimizers = _listed(module.configure_optimizers())
    except Exception as error:
        reason = f"configure_optimizers needs a Trainer ({first_line(error)})"
        return None, f"left out: {reason}", None
    if len(old) != len(optimizers):
        return None, f"left out: {len(old)} in the file, {len(optimizers)} in the module", None
    keys = _parameter_keys(module, checkpoint["state_dict"], names)
    live = {id(param): name for name, param in module.named_parameters()}
    states = []
    for theirs, optimizer in zip(old, optimizers, strict=True):
        mapped = _mapped_state(theirs, optimizer, keys, live)
        if isinstance(mapped, str):
            return None, f"left out: {mapped}", None
        states.append(mapped)
    return states, "restored", engine.optimizer_names(optimizers)


def _listed(made: Any) -> list[Any]:
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
        made = made[0]
    found = list(made) if isinstance(made, (list, tuple)) else [made]
    return [one["optimizer"] if isinstance(one, dict) else one for one in found if one is not None]


def _parameter_keys(
    module: Any, state: Mapping[str, Any], names: Mapping[str, str]
) -> list[str | None]:
    """Returns the names of now of all parameters of the old module, in its order.

    ``None`` stands for one that is not there any more: the values before training that PEFT keeps.
    """
    buffers = {name for name, _ in module.named_buffers()}
    seen: set[int] = set()
    keys: list[str | None] = []
    for key, value in state.items():
        # Tied parameters are one, and have one place in memory.
        if isinstance(value, torch.Tensor) and names.get(key) not in buffers:
            if value.data_ptr() not in seen or not value.numel():
                keys.append(names.get(key))
            seen.add(value.data_ptr())
    return keys


def _mapped_state(
    theirs: Mapping[str, Any], optimizer: Any, keys: list[str | None], live: Mapping[int, str]
) -> dict[str, Any] | str:
    """Moves states to the places of the same parameters, or returns why that is not certain.

    The order of the parameters in the file is taken for that of the old optimizer where the
    optimizer of now has the same, and where shapes leave no other.
    """
    groups, old_groups = optimizer.param_groups, theirs["param_groups"]
    if len(groups) != len(old_groups):
        return f"{len(old_groups)} parameter groups in the file, {len(groups)} in the module"
    written, place = [], 0
    state: dict[int, Any] = {}
    for group, old in zip(groups, old_groups, strict=True):
        params, numbers = group["params"], old["params"]
        states = {n: theirs["state"][n] for n in numbers if n in theirs["state"]}
        trained = [live[id(param)] for param in params if param.requires_grad]
        everything = len(groups) == 1 and len(numbers) == len(keys)
        orders = _orders(numbers, list(states), trained, keys, everything)
        if orders is None:
            return f"{len(numbers)} tensors in a group of the file, and {len(trained)} train in it"
        places: dict[str | None, int] = {live[id(param)]: i for i, param in enumerate(params)}
        shapes: dict[str | None, Any] = {live[id(param)]: param.shape for param in params}
        found = _certain(orders, {n: _shapes(values) for n, values in states.items()}, shapes)
        if isinstance(found, str):
            return found
        state |= {place + places[name]: states[n] for n, name in found.items()}
        written.append({**old, "params": list(range(place, place + len(params)))})
        place += len(params)
    return {"state": state, "param_groups": written}


def _orders(
    numbers: list[int],
    with_state: list[int],
    trained: list[str],
    keys: list[str | None],
    everything: bool,
) -> tuple[dict[int, str | None], dict[int, str | None]] | None:
    """Returns which number is which parameter in the order of the file, and in the one of now.

    Args:
        numbers: Those of a group of the old optimizer.
        with_state: Those of them that have a state; frozen tensors have none.
        trained: Names of what trains in the group now, in the order of the optimizer of now.
        keys: Names of the parameters in the file, in its order.
        everything: Whether the old optimizer had all of them.

    Returns:
        ``None`` where the numbers are not as many; no names where the file lacks some.
    """
    training = set(trained)
    own = [key for key in keys if key in training]
    whole = everything or len(own) == len(trained)
    file = (keys if everything else own) if whole else trained
    which = next((some for some in (numbers, with_state) if len(some) == len(file)), None)
    if which is None:
        return None
    in_file = set(own) if whole else training
    rest = iter([name for name in trained if name in in_file])
    now = [next(rest) if name in in_file else name for name in file]
    then = file if whole else [None] * len(file)
    return dict(zip(which, then, strict=True)), dict(zip(which, now, strict=True))


def _certain(
    orders: tuple[dict[int, str | None], dict[int, str | None]],
    states: Mapping[int, tuple[torch.Size, ...]],
    shapes: Mapping[str | None, torch.Size],
) -> dict[int, str | None] | str:
    """Returns the names of the states where both orders agree, or shapes decide, else why not."""
    then, now = orders
    differing = Counter(states[n] for n in states if then[n] != now[n])
    if any(count > 1 and shape for shape, count in differing.items()):
        return "the file does not say in which order its optimizer had tensors of the same shape"
    for order in orders:
        misfits = [n for n in states if any(s != shapes.get(order[n]) for s in states[n])]
        misfits += [n for n in states if order[n] not in shapes]
        if not misfits:
            return {n: order[n] for n in states}
    return f"state {misfits[0]} in the file is not that of a tensor that trains"


def _shapes(values: Mapping[str, Any]) -> tuple[torch.Size, ...]:
    return tuple(v.shape for v in values.values() if isinstance(v, torch.Tensor) and v.ndim)

"""Replacement of optimizers: fused, 8-bit and paged.

An optimizer object stays the object that it was and gets another class, so that LR schedulers,
Lightning's wrappers, hooks and the user's own references keep working.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_peft.compat.torch import (
    OPTIMIZER_HOOKS,
    SHARED_OPTIMIZER_ATTRIBUTES,
    has_load_state_dict_hooks,
    is_lr_scheduler_step,
    lr_scheduler_step,
)
from lightning_peft.engine.backends.bnb_optimizers import OPTIMIZERS, paged_copy
from lightning_peft.errors import CheckpointError, ConfigError, itemize, similar_names

# For "auto" with 16-bit weights: torch keeps moments in the dtype of the weights.
_AUTO_16_BIT = "adamw_32bit"
# bitsandbytes pages only states of parameters with at least this many elements.
_PAGED_FROM = 100_000
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSUPPORTED_OPTIONS = ("amsgrad", "maximize", "capturable", "differentiable")
_FLOATS = ("lr", "betas", "eps", "weight_decay")
# Ways to compute the same step.
_IMPLEMENTATION_OPTIONS = ("foreach", "fused", "decoupled_weight_decay")
_BETA3 = 0.9999
_FUSED_ON = {"cpu", "cuda", "xpu"}


def check_optimizer_name(name: str | None) -> None:
    """Checks the ``optimizer`` argument."""
    known = ["auto", *OPTIMIZERS]
    if name is None or name in known:
        return
    raise ConfigError(
        f"optimizer={name!r} is none of the optimizers of bitsandbytes that can stand in for "
        f"yours{similar_names(str(name), known)}. There are "
        f"{', '.join(known)}, and None, which keeps what configure_optimizers returns."
    )


def replace_optimizers(
    optimizers: Iterable[Any], name: str, frozen: Collection[int] = ()
) -> list[str]:
    """Gives optimizers bitsandbytes' class in place, before their first step.

    Parameter groups stay the same objects with their order, hyperparameters and further keys.
    Frozen parameters leave their group; a group that gets empty stays, since LR schedulers count
    them.

    Args:
        optimizers: What ``configure_optimizers`` returned.
        name: One of ``OPTIMIZERS`` for all; or ``"auto"`` for those that are exactly torch's Adam
            or AdamW: their fused step, one kernel for many tensors, and with 16-bit weights
            bitsandbytes' 32-bit AdamW where it steps the same. The others are kept.
        frozen: Ids of the parameters to take out of the groups.

    Returns:
        What was done, one sentence for each kind of optimizer; empty where nothing was.
    """
    target = OPTIMIZERS[_AUTO_16_BIT if name == "auto" else name]
    outcomes: dict[str, None] = {}
    if name == "auto":
        optimizers = [o for o in optimizers if not _fuse(o, frozen, outcomes)]
    found = [(o, _problems(o, target, frozen)) for o in optimizers if type(o) is not target]
    if name == "auto":
        found = [(o, [*_adam_problems(o), *problems]) for o, problems in found]
    elif any(problems for _, problems in found):
        raise ConfigError(
            f"optimizer={name!r} cannot take the place of what configure_optimizers returned:"
            + itemize(f"{type(o).__name__}: {one}" for o, problems in found for one in problems)
            + "\nChange these settings, or leave the optimizer as it is: optimizer=None."
        )
    for optimizer, problems in found:
        before = type(optimizer).__name__
        if problems:
            outcomes[f"{before} is kept: {'; '.join(problems)}"] = None
            continue
        notes = _convert(optimizer, target)
        outcomes[f"{before} is now bitsandbytes' {target.__name__}{notes}"] = None
        _remove_frozen(optimizer, frozen)
    return list(outcomes)


def _remove_frozen(optimizer: Any, frozen: Collection[int]) -> None:
    for group in optimizer.param_groups:
        stays = [id(p) not in frozen for p in group["params"]]
        for key in ("params", "param_names"):
            group.get(key, [])[:] = itertools.compress(group.get(key, []), stays)


def _fuse(optimizer: Any, frozen: Collection[int], outcomes: dict[str, None]) -> bool:
    """Chooses torch's fused kernel, or keeps the optimizer, and notes which.

    Returns ``False`` for 16-bit weights, whose moments torch would keep in their dtype.
    """
    groups = getattr(optimizer, "param_groups", [])
    trained = [p for group in groups for p in group["params"] if id(p) not in frozen]
    problems = _fused_problems(optimizer, trained)
    if not problems and any(p.dtype in _DTYPES[1:] for p in trained):
        return False
    name = type(optimizer).__name__
    if problems:
        outcomes[f"{name} is kept: {'; '.join(problems)}"] = None
        return True
    # Not ``_step_supports_amp_scaling``, which the constructor sets: Lightning refuses to clip
    # gradients that the step itself unscales.
    for settings in (optimizer.defaults, *groups):
        settings["fused"] = True
    _remove_frozen(optimizer, frozen)
    outcomes[f"{name} takes torch's fused step"] = None
    return True


def _fused_problems(optimizer: Any, trained: list[Any]) -> list[str]:
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return ["it is not torch's own Adam or AdamW"]
    problems = [
        f"{key}={group[key]} is yours"
        for group in optimizer.param_groups
        for key in ("foreach", "fused", "differentiable")
        if group.get(key) not in ((None, False) if key == "differentiable" else (None,))
    ]
    if optimizer.state:
        problems.append("it has a state already")
    places = {p.device.type for p in trained}
    if not places <= _FUSED_ON:
        problems.append(f"torch has no fused step on {', '.join(sorted(places - _FUSED_ON))}")
    if any(type(p) not in (torch.nn.Parameter, torch.Tensor) for p in trained):
        # One kernel takes no sharded and plain tensors together.
        problems.append("its weights are not plain tensors")
    return list(dict.fromkeys(problems))


def _adam_problems(optimizer: Any) -> list[str]:
    if _has_l2_decay(optimizer):
        return [
            "its weight_decay is added to the gradient (L2), and bitsandbytes has only decoupled "
            "weight decay; use AdamW for that"
        ]
    return []


def _has_l2_decay(optimizer: Any) -> bool:
    if isinstance(optimizer, torch.optim.AdamW):
        return False
    return any(
        group.get("weight_decay") and not group.get("decoupled_weight_decay")
        for group in optimizer.param_groups
    )


def _problems(optimizer: Any, target: Any, frozen: Collection[int]) -> list[str]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        return ["it is not a torch.optim.Optimizer"]
    problems: list[str] = []
    for group in optimizer.param_groups:
        problems += [
            f"{key}=True is not in bitsandbytes" for key in _UNSUPPORTED_OPTIONS if group.get(key)
        ]
        for key in _FLOATS:
            value = group.get(key, 0.0)
            values = value if isinstance(value, (tuple, list)) else [value]
            if any(isinstance(one, torch.Tensor) for one in values):
                problems.append(f"{key} is a tensor, and bitsandbytes takes numbers")
        if "lr" not in group:
            problems.append("a parameter group has no lr")
        params = [p for p in group["params"] if id(p) not in frozen]
        for dtype in {p.dtype for p in params} - {*_DTYPES}:
            problems.append(f"it holds {dtype} parameters, and bitsandbytes would round them")
        on_cpu = any(p.device.type == "cpu" and p.numel() >= _PAGED_FROM for p in params)
        if on_cpu and target.__name__.startswith("PagedAdEMAMix"):
            problems.append(
                f"bitsandbytes cannot page AdEMAMix on the CPU for parameters of {_PAGED_FROM:,} "
                "elements and more"
            )
    if optimizer.state:
        problems.append("it has a state already, which would be lost")
    step = optimizer.__dict__.get("step")
    if step is not None and not is_lr_scheduler_step(step, type(optimizer)):
        problems.append("its step method was replaced by another function")
    if has_load_state_dict_hooks(optimizer):
        problems.append("bitsandbytes would not call its hooks of load_state_dict")
    return list(dict.fromkeys(problems))


def _convert(optimizer: Any, target: Any) -> str:
    """Gives ``optimizer`` the class ``target``; returns a description of the change."""
    donor: Any = target([torch.nn.Parameter(torch.empty(0))])
    notes = _changes(optimizer, donor)
    old_defaults = dict(optimizer.defaults)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        for key in old_defaults.keys() - donor.defaults.keys():
            settings.pop(key, None)
        for key, value in donor.defaults.items():
            settings.setdefault(key, value)
        if len(donor.defaults["betas"]) > len(settings["betas"]):
            settings["betas"] = (*settings["betas"], _BETA3)
    patched = "step" in optimizer.__dict__
    # Private attributes describe how the old class steps, such as unscaling in a fused one.
    kept = {
        key: value
        for key, value in optimizer.__dict__.items()
        if not key.startswith("_") or key.startswith(SHARED_OPTIMIZER_ATTRIBUTES)
    }
    own = {
        key: value for key, value in donor.__dict__.items() if not key.startswith(OPTIMIZER_HOOKS)
    }
    core = ("defaults", "state", "param_groups")
    optimizer.__class__ = target
    optimizer.__dict__.clear()
    optimizer.__dict__.update({**kept, **own, **{key: kept[key] for key in core}})
    if patched:
        optimizer.__dict__["step"] = lr_scheduler_step(optimizer)
    return notes


def _changes(optimizer: Any, donor: Any) -> str:
    notes = []
    if _has_l2_decay(optimizer):
        notes.append("weight_decay is decoupled now (AdamW's), not added to the gradient")
    lost = {
        f"{key}={group[key]}"
        for group in optimizer.param_groups
        for key in optimizer.defaults.keys() - donor.defaults.keys() - {*_IMPLEMENTATION_OPTIONS}
        if group.get(key)
    }
    if lost:
        notes.append(f"{', '.join(sorted(lost))} has no meaning in it")
    new = {key: value for key, value in donor.defaults.items() if key not in optimizer.defaults}
    if new.get("betas") and len(new["betas"]) == 2 or new.get("alpha"):
        shown = {key: value for key, value in new.items() if value}
        notes.append(f"with bitsandbytes' defaults {shown}")
    return f" ({'; '.join(notes)})" if notes else ""


def optimizer_names(optimizers: Iterable[Any]) -> list[str]:
    """Returns the class names of optimizers, which a checkpoint records with their states."""
    return [type(optimizer).__name__ for optimizer in optimizers]


def name_of_optimizer(class_name: str) -> str | None:
    """Returns the name of the bitsandbytes optimizer whose class is called so, if there is one."""
    return next((name for name, cls in OPTIMIZERS.items() if cls.__name__ == class_name), None)


def describe_optimizers(module: nn.Module, optimizers: Iterable[Any]) -> dict[str, Any]:
    """Describes optimizers for a checkpoint: classes, and parameters by name in their groups."""
    names = {id(param): name for name, param in module.named_parameters()}
    optimizers = list(optimizers)
    held = [[[names.get(id(p)) for p in g["params"]] for g in o.param_groups] for o in optimizers]
    return {"optimizers": optimizer_names(optimizers), "optimized": held}


def _places(groups: list[list[str]]) -> list[str]:
    return [f"{name} in group {index}" for index, group in enumerate(groups) for name in group]


def check_same_optimizers(
    saved: Mapping[str, Any], module: nn.Module, optimizers: Iterable[Any]
) -> None:
    """Compares the optimizers of a checkpoint with those that are to take their states.

    ``saved`` has what :func:`describe_optimizers` returned then; what it lacks is not compared.
    """
    described = describe_optimizers(module, optimizers)
    classes, names = saved.get("optimizers"), described["optimizers"]
    if classes is not None and classes != names:
        raise CheckpointError(
            f"The checkpoint holds the states of {', '.join(classes) or 'no optimizer'}, and this "
            f"run has {', '.join(names) or 'no optimizer'}: it cannot go on from them. Give the "
            "same `optimizer` argument and the same configure_optimizers as the run that saved "
            "it, or start a new run from its weights by lightning_peft.load_from_checkpoint."
        )
    for name, old, new in zip(
        names, saved.get("optimized", described["optimized"]), described["optimized"], strict=True
    ):
        if old != new:
            places = itertools.zip_longest(_places(old), _places(new), fillvalue="nothing")
            counts = f"{len(old)} groups", str(len(new))
            before, now = next((pair for pair in places if pair[0] != pair[1]), counts)
            raise CheckpointError(
                f"The checkpoint has a state of {name} for {before}, and this run {now} in that "
                "place. torch goes by places, so that states would be taken for those of other "
                "parameters. Let configure_optimizers list the same parameters in the same order "
                "and groups (a set has no order), or start a new run from the weights by "
                "lightning_peft.load_from_checkpoint."
            )


def restore_paging(optimizer: Any) -> int:
    """Moves restored states of a paged optimizer on CUDA back into paged memory.

    Loading a state dict puts plain tensors where the paged buffers were, and from then on the
    optimizer would hold all its states on the GPU, silently.

    Returns:
        The number of states moved.
    """
    moved = 0
    if not getattr(optimizer, "is_paged", False):
        return moved
    for param, state in optimizer.state.items():
        for name, value in state.items():
            pageable = (
                isinstance(value, torch.Tensor)
                and param.device.type == "cuda"
                # Those of AdEMAMix hold two averages in one.
                and value.shape[-param.ndim :] == param.shape
                and param.numel() >= _PAGED_FROM
                and not getattr(value, "is_paged", False)
            )
            if pageable:
                state[name] = paged_copy(value, param.device)
                moved += 1
    return moved

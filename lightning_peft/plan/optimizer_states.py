"""Memory of optimizer states and steps.

torch's AdamW keeps two moments in the dtype of a weight. bitsandbytes' optimizers (0.50.2,
``optim/optimizer.py``) keep float32 states, or one byte for each element and a float32 constant for
each block of 256; tensors of fewer than 4,096 elements stay in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_peft import engine
from lightning_peft.errors import ConfigError

_SMALL, _BLOCK = 4096, 256
# Elements from which bitsandbytes pages the states of a tensor.
_PAGED_FROM = 100_000
OWN = ("adamw", "adamw_fused", "adamw_torch")


def check_optimizer(name: str) -> list[str]:
    """Returns the problems of an optimizer's name; empty if it is known."""
    if name in OWN:
        return []
    try:
        engine.check_optimizer_name(name)
    except ConfigError as error:
        return [f"{error} The planner also knows {', '.join(OWN)}."]
    return []


def state_bytes(params: Iterable[nn.Parameter], name: str) -> int:
    """Returns the bytes of the states of ``params`` after the first step."""
    return sum(_states_of(param, name) for param in params)


def paged_bytes(params: Iterable[nn.Parameter], name: str) -> int:
    """Returns how many of these bytes a GPU may hand to the CPU when it runs out."""
    if not name.startswith("paged_"):
        return 0
    return state_bytes([p for p in params if p.numel() >= _PAGED_FROM], name)


def step_bytes(params: Iterable[nn.Parameter], name: str, device: str) -> int:
    """Returns the temporary bytes of one step.

    torch's AdamW takes the square roots of all second moments at once on a GPU (``foreach``), and
    those of one tensor after the other, twice, on a CPU. Its fused step and bitsandbytes' kernels
    need nothing.
    """
    if name not in ("adamw", "adamw_torch"):
        return 0
    # float32 states of 16-bit weights are bitsandbytes' then: torch's follow the weights.
    own = [p for p in params if name == "adamw_torch" or p.element_size() >= 4]
    sizes = [p.numel() * p.element_size() for p in own]
    return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)


def _states_of(param: nn.Parameter, name: str) -> int:
    numel = param.numel()
    if name in OWN:
        return 2 * numel * (param.element_size() if name == "adamw_torch" else 4)
    states = 1 if "lion" in name else 3 if "ademamix" in name else 2
    if not name.endswith("8bit") or numel < _SMALL:
        return 4 * states * numel
    return states * (numel + 4 * -(-numel // _BLOCK))

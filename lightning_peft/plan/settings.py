"""Settings of a plan, and memory of optimizer states and steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.errors import ConfigError, itemize, similar_names

_SMALL, _BLOCK = 4096, 256
# Elements from which bitsandbytes pages the states of a tensor.
_PAGED_FROM = 100_000
OWN = ("adamw", "adamw_fused", "adamw_torch")
Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
# Lightning's own names.
PRECISIONS = ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


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


@dataclass(frozen=True)
class PlanSettings:
    """One training run, as far as memory is concerned.

    Attributes:
        method: ``"full"``, ``"lora"`` or ``"qlora"`` (NF4 with double quantization).
        batch_size: Rows in a batch.
        seq_len: Tokens in a row.
        accumulate: Batches whose gradients are added up before a step.
        precision: The Trainer's ``precision``.
        optimizer: ``"adamw"`` (states in float32), ``"adamw_fused"`` (the same in torch's fused
            step), ``"adamw_torch"`` (torch's AdamW, whose states have the dtype of the weights),
            one of the engine's names such as ``"paged_adamw_8bit"``, or ``"auto"``: what the
            strategies do by default, the fused step for QLoRA and AdamW for the others.
        gradient_checkpointing: Whether blocks keep only their inputs. ``"auto"`` is decided by the
            device, as in a run; where none is given it is on for QLoRA, and it is always on where
            the base is shared.
        lora: LoRA arguments by PEFT's names.
        quantization: Arguments of :func:`lightning_peft.engine.quantization_config`.
        adapt: Names of the parts to adapt.
        device: ``"cuda"`` or ``"cpu"``: the optimizers of both need other temporary memory.
        padded: Whether the rows of a batch differ in length, which needs an attention mask; by
            default where there is more than one.
        processes: How many train together, each on a device of its own; the batch is that of one.
        sharding: ``"fsdp2"`` where they share the frozen base, as in the strategies.
    """

    method: Method = "qlora"
    batch_size: int = 1
    seq_len: int = 512
    accumulate: int = 1
    precision: str = "32-true"
    optimizer: str = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    lora: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    quantization: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    adapt: tuple[str, ...] | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    padded: bool | None = None
    processes: int = 1
    sharding: Literal["fsdp2"] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r}: a positive integer"
            for name in ("batch_size", "seq_len", "accumulate", "processes")
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        for name, known in (("method", METHODS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                problems.append(
                    f"{name}={value!r}: one of {', '.join(known)}{similar_names(str(value), known)}"
                )
        if self.sharding not in (None, "fsdp2"):
            problems.append(f"sharding={self.sharding!r}: 'fsdp2', or None")
        problems += check_optimizer(self.optimizer)
        if problems:
            raise ConfigError("This run cannot be planned:" + itemize(problems))

    @property
    def checkpointing(self) -> bool:
        """Whether activations are checkpointed."""
        setting = self.gradient_checkpointing
        return self.method == "qlora" or self.is_sharded if setting == "auto" else bool(setting)

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the frozen base."""
        return self.sharding is not None and self.processes > 1 and self.method != "full"

    @property
    def optimizer_name(self) -> str:
        """The optimizer that ``"auto"`` stands for."""
        if self.optimizer != "auto":
            return self.optimizer
        return "adamw_fused" if self.method == "qlora" else "adamw"

    @property
    def is_padded(self) -> bool:
        """Whether attention needs a mask."""
        return self.batch_size > 1 if self.padded is None else self.padded

    @property
    def cast(self) -> torch.dtype | None:
        """The dtype that the Trainer's precision casts the module to, if it does."""
        return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(self.precision)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast, if there is one."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

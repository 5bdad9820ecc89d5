"""Settings of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from lightning_peft.errors import ConfigError, itemize, similar_names
from lightning_peft.plan.optimizer_states import check_optimizer

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
# Lightning's own names.
PRECISIONS = ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


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

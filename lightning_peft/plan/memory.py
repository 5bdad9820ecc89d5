"""Memory of weights, gradients and optimizer states by method.

Counted from a copy of the model without data (on torch's meta device). Activations come on top;
they depend on batch and sequence and are about the same for all three methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_peft import engine
from lightning_peft.plan.meta_copy import meta_copy

# Adam keeps two float32 moments for every trained weight.
_ADAM_BYTES = 8


@dataclass(frozen=True)
class MethodMemory:
    """Static memory of one method, in bytes, and how many weights it trains."""

    method: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer


def static_memory(model: nn.Module, r: int = 16) -> list[MethodMemory]:
    """Returns the memory of full fine-tuning, LoRA of rank ``r`` and QLoRA (NF4)."""
    copy = meta_copy(model)
    weights = {name: (p.numel(), p.element_size()) for name, p in copy.named_parameters()}
    count = sum(numel for numel, _ in weights.values())
    dense = sum(numel * size for numel, size in weights.values())
    engine.inject(copy, r=r)
    adapters = sum(p.numel() for p in engine.all_adapter_parameters(copy))
    quantized = [weights[engine.weight_name(name)] for name in engine.adapted_layers(copy)]
    config = engine.quantization_config()
    stored_bytes = engine.backend_for(config).stored_bytes
    saved = sum(numel * size - stored_bytes(numel, config) for numel, size in quantized)
    master = 4 * adapters
    return [
        MethodMemory("full", count, dense, dense, _ADAM_BYTES * count),
        MethodMemory("lora", adapters, dense + master, master, _ADAM_BYTES * adapters),
        MethodMemory("qlora", adapters, dense - saved + master, master, _ADAM_BYTES * adapters),
    ]

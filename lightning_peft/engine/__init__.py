"""The engine: torch, PEFT and bitsandbytes; it works on any ``torch.nn.Module``.

Names load on first use, since PEFT and bitsandbytes take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_peft.engine.adapters import (
        adapted_layers,
        adapter_parameters,
        all_adapter_parameters,
        disable_adapters,
        set_adapter,
        trained_parameters,
    )
    from lightning_peft.engine.configuration import (
        DECISIVE_FIELDS,
        as_peft_config,
        config_to_dict,
        lora_config,
    )
    from lightning_peft.engine.files.adapter_files import (
        packed_adapters,
        save_adapter,
    )
    from lightning_peft.engine.files.adapter_format import (
        read_adapter,
        read_json,
    )
    from lightning_peft.engine.files.adapter_loading import (
        load_adapter,
    )
    from lightning_peft.engine.files.module_state import (
        adapter_names_of,
        load_trainable_state_dict,
        own_tensors,
        trainable_state_dict,
        without_base,
    )
    from lightning_peft.engine.files.state import (
        check_description,
        describe,
        inject_as_described,
    )
    from lightning_peft.engine.injection import (
        inject,
    )
    from lightning_peft.engine.late_copies import (
        explained,
        follow_late_copies,
    )
    from lightning_peft.engine.layers.quantization import (
        quantize,
    )
    from lightning_peft.engine.memory.activation_budget import (
        read_budget,
    )
    from lightning_peft.engine.memory.activation_checkpointing import (
        checkpoint_activations,
        is_checkpointed,
        keeps_a_budget,
    )
    from lightning_peft.engine.memory.causal_lm_loss import (
        is_own_loss,
    )
    from lightning_peft.engine.memory.cross_entropy import (
        cross_entropy_and_gradient,
        summed_cross_entropy,
    )
    from lightning_peft.engine.memory.held_parameters import hold_adapters, optimizers_of
    from lightning_peft.engine.memory.optimizers import (
        check_optimizer_name,
        check_same_optimizers,
        name_of_optimizer,
        optimizer_names,
        replace_optimizers,
        restore_paging,
    )
    from lightning_peft.engine.memory.quantized_loading import (
        loading_for_injection,
        quantized_loading,
    )
    from lightning_peft.engine.memory.watched_loads import (
        keep_quantized,
    )
    from lightning_peft.engine.memory.weightless import (
        has_values,
        inject_without_values,
        quantizable_layers,
        quantize_without_values,
        quantized_tensors,
        remade,
    )
    from lightning_peft.engine.merging import (
        merge,
        unmerge,
    )
    from lightning_peft.engine.quantization_settings import (
        quantization_config,
        quantization_from_dict,
        quantization_to_dict,
    )
    from lightning_peft.engine.record import (
        record_of,
        require_record,
        set_record,
    )
    from lightning_peft.engine.reporting import (
        report,
        show,
    )
    from lightning_peft.engine.selection.parts import (
        inside,
    )
    from lightning_peft.engine.selection.planning import (
        as_recorded,
    )
    from lightning_peft.engine.selection.targets import (
        resolve_targets,
    )
    from lightning_peft.engine.training_mode import (
        set_training_mode,
    )
    from lightning_peft.engine.twins import (
        check_followers,
        copies_outside,
        freeze_left_out,
    )
    from lightning_peft.engine.unheld import (
        freeze_unheld,
        release_unheld,
    )
    from lightning_peft.engine.unloading import (
        unload,
    )
    from lightning_peft.engine.verification.result import (
        Check,
        Verification,
    )
    from lightning_peft.engine.verification.structure import (
        structural_problems,
    )
    from lightning_peft.engine.verification.trial import (
        default_step,
    )
    from lightning_peft.engine.verification.verify import (
        verify,
    )

_HOMES = {
    "memory.activation_budget": ("read_budget",),
    "memory.activation_checkpointing": (
        "checkpoint_activations",
        "is_checkpointed",
        "keeps_a_budget",
    ),
    "files.adapter_files": (
        "packed_adapters",
        "save_adapter",
    ),
    "files.adapter_loading": ("load_adapter",),
    "adapters": (
        "adapted_layers",
        "adapter_parameters",
        "all_adapter_parameters",
        "disable_adapters",
        "set_adapter",
        "trained_parameters",
    ),
    "files.adapter_format": ("read_adapter", "read_json"),
    "verification.result": ("Check", "Verification"),
    "configuration": (
        "DECISIVE_FIELDS",
        "as_peft_config",
        "config_to_dict",
        "lora_config",
    ),
    "injection": ("inject",),
    "merging": (
        "merge",
        "unmerge",
    ),
    "memory.causal_lm_loss": ("is_own_loss",),
    "memory.cross_entropy": ("cross_entropy_and_gradient", "summed_cross_entropy"),
    "memory.held_parameters": ("hold_adapters", "optimizers_of"),
    "memory.optimizers": (
        "check_optimizer_name",
        "check_same_optimizers",
        "name_of_optimizer",
        "optimizer_names",
        "replace_optimizers",
        "restore_paging",
    ),
    "quantization_settings": (
        "quantization_config",
        "quantization_from_dict",
        "quantization_to_dict",
    ),
    "memory.quantized_loading": (
        "loading_for_injection",
        "quantized_loading",
    ),
    "memory.watched_loads": ("keep_quantized",),
    "memory.weightless": (
        "has_values",
        "inject_without_values",
        "quantizable_layers",
        "quantize_without_values",
        "quantized_tensors",
        "remade",
    ),
    "late_copies": ("explained", "follow_late_copies"),
    "layers.quantization": ("quantize",),
    "record": (
        "record_of",
        "require_record",
        "set_record",
    ),
    "reporting": (
        "report",
        "show",
    ),
    "files.state": (
        "check_description",
        "describe",
        "inject_as_described",
    ),
    "files.module_state": (
        "adapter_names_of",
        "load_trainable_state_dict",
        "own_tensors",
        "trainable_state_dict",
        "without_base",
    ),
    "verification.structure": ("structural_problems",),
    "selection.parts": ("inside",),
    "selection.planning": ("as_recorded",),
    "selection.targets": ("resolve_targets",),
    "training_mode": ("set_training_mode",),
    "twins": (
        "check_followers",
        "copies_outside",
        "freeze_left_out",
    ),
    "unheld": ("freeze_unheld", "release_unheld"),
    "unloading": ("unload",),
    "verification.trial": ("default_step",),
    "verification.verify": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Check",
    "DECISIVE_FIELDS",
    "Verification",
    "adapted_layers",
    "adapter_names_of",
    "adapter_parameters",
    "all_adapter_parameters",
    "as_peft_config",
    "as_recorded",
    "check_description",
    "check_followers",
    "check_optimizer_name",
    "check_same_optimizers",
    "checkpoint_activations",
    "config_to_dict",
    "copies_outside",
    "cross_entropy_and_gradient",
    "default_step",
    "describe",
    "disable_adapters",
    "explained",
    "follow_late_copies",
    "freeze_left_out",
    "freeze_unheld",
    "has_values",
    "hold_adapters",
    "inject",
    "inject_as_described",
    "inject_without_values",
    "inside",
    "is_checkpointed",
    "is_own_loss",
    "keep_quantized",
    "keeps_a_budget",
    "load_adapter",
    "load_trainable_state_dict",
    "loading_for_injection",
    "lora_config",
    "merge",
    "name_of_optimizer",
    "optimizer_names",
    "optimizers_of",
    "own_tensors",
    "packed_adapters",
    "quantizable_layers",
    "quantization_config",
    "quantization_from_dict",
    "quantization_to_dict",
    "quantize",
    "quantize_without_values",
    "quantized_loading",
    "quantized_tensors",
    "read_adapter",
    "read_budget",
    "read_json",
    "record_of",
    "release_unheld",
    "remade",
    "replace_optimizers",
    "report",
    "require_record",
    "resolve_targets",
    "restore_paging",
    "save_adapter",
    "set_adapter",
    "set_record",
    "set_training_mode",
    "show",
    "structural_problems",
    "summed_cross_entropy",
    "trainable_state_dict",
    "trained_parameters",
    "unload",
    "unmerge",
    "verify",
    "without_base",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value

"""Injection of adapters: plan, fingerprint, quantize, inject, freeze, record."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.arguments import LoRAFields
from lightning_peft.compat.peft import get_pattern_key
from lightning_peft.compat.transformers import origin_of
from lightning_peft.engine.adapters import activate, adapted_layers, adapter_file_tensors
from lightning_peft.engine.backends.conversion import (
    adopt_prequantized,
    loaded_formats,
    release_freed_memory,
)
from lightning_peft.engine.backends.registry import is_quantized, quantization_to_dict
from lightning_peft.engine.batch_initialization import check_batches, initialize_from_batches
from lightning_peft.engine.configuration import as_peft_config, config_to_dict, lora_config
from lightning_peft.engine.files.adapter_files import replace_save_pretrained
from lightning_peft.engine.files.base_tensors import include_in_files
from lightning_peft.engine.files.excluded_weights import agree_on_excluded, note_excluded
from lightning_peft.engine.fingerprint import buffer_checksums, stored_fingerprint
from lightning_peft.engine.freezing import freeze_base, user_eval_modules
from lightning_peft.engine.gathering import group_size
from lightning_peft.engine.inner_adapters import adopt_inner_adapters, refuse_replacing_adapters
from lightning_peft.engine.layers.attention import projections
from lightning_peft.engine.layers.expert_weights import (
    ExpertWeight,
    exposed_experts,
    parameter_name,
)
from lightning_peft.engine.layers.tokens import attach_tokens, trained_rows
from lightning_peft.engine.loading.quantize_on_load import GGUF_HASH, base_fingerprint, dense_bytes
from lightning_peft.engine.methods.lora_config import changes_base, needs_data
from lightning_peft.engine.momentum_copies import find_momentum_copies, link_copies
from lightning_peft.engine.peft_injection import inject_in_place, inject_with_peft, quantize_layers
from lightning_peft.engine.peft_wrappers import (
    PeftWrapped,
    check_requested_config,
    find_peft_wrapped,
    unwrapped_peft_layers,
    values_before_training,
)
from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.record import (
    AdaptedModuleRecord,
    AdapterInfo,
    Record,
    record_of,
    refuse_sharded,
    require_record,
    set_record,
)
from lightning_peft.engine.reporting import Report, report
from lightning_peft.engine.rollback import restored_on_error
from lightning_peft.engine.selection.parts import base_modules, inside
from lightning_peft.engine.selection.planning import InjectionPlan, InjectionRequest, make_plans
from lightning_peft.engine.selection.scope import left_modules, left_parameters
from lightning_peft.engine.selection.targets import PATTERN_FIELDS, patterns_for
from lightning_peft.engine.training.causal_lm_loss import patch_causal_lm_loss
from lightning_peft.engine.verification.probe import default_step
from lightning_peft.engine.vocabulary import resized_embeddings, vocabulary_size, without_new_rows
from lightning_peft.errors import ConfigError

# Of a base, that weights of experts are quantized too.
EXPERTS, ATTENTIONS = "quantized_experts", "quantized_attentions"
# Kinds of layers that versions before left dense, by what records have where they are quantized.
LATER_KINDS: dict[str, type[nn.Module]] = {
    EXPERTS: ExpertWeight,
    ATTENTIONS: nn.MultiheadAttention,
}
# The heads that PEFT trains in full where a config names a task.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def inject(
    module: nn.Module,
    peft_config: PeftConfig | Mapping[str, Any] | None = None,
    *,
    quantization_config: Any | None = None,
    adapt: str | Iterable[str] | None = None,
    adapter_name: str = "default",
    device: torch.device | str | None = None,
    exclude_from_checkpoint: str | Iterable[str] | None = None,
    batches: Iterable[Any] | None = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    **lora_arguments: Any,
) -> Report:
    """Adds adapters to ``module`` in place and freezes the rest of the adapted parts.

    The module keeps its identity, classes and parameter names. Heads and parts that are not adapted
    stay as they are; so do metrics, losses, and what the module froze itself while other layers of
    it train, which the report names. Without quantization, the meta device works too.

    Args:
        module: The module; a LightningModule, a transformers model or your own.
        peft_config: A PEFT config, or its fields with a ``peft_type``; by default LoRA with
            ``lora_arguments``. Without ``target_modules``, all linear layers but heads are adapted,
            or the convolutions of a part that has none. Where ``peft.get_peft_model`` wrapped a
            part, its LoRA adapters are moved onto the layers, and kept if nothing is given.
        quantization_config: Quantizes the linear layers of the adapted parts first.
        adapt: Names of the submodules to adapt, whatever they are; by default the pretrained.
        adapter_name: A second call with another name adds an adapter that is inactive; see
            :func:`lightning_peft.set_adapter`.
        device: Where quantization happens, and where the quantized weights stay.
        exclude_from_checkpoint: As in ``LoRAStrategy``; then all processes have to call this.
        batches: This process's, on the module's device, for an ``init_lora_weights`` made from
            them (``"eva"``, ``"corda"``, ``"lora_ga"``); then all processes have to call this.
        step: ``step(module, batch)`` returns a scalar loss; as in :func:`lightning_peft.verify`.
        **lora_arguments: As in :class:`lightning_peft.LoRAStrategy`: ``r``, ``lora_alpha``, ...

    Returns:
        The report that :func:`lightning_peft.report` gives.

    Raises:
        ConfigError: If the settings cannot work.
        TargetModulesError: If names match nothing; every unmatched name is listed.
        LifecycleError: If the adapter is there already.
        UnsupportedError: If the combination would be silently wrong.
    """
    config = _config_of(peft_config, lora_arguments)
    request = InjectionRequest(config, quantization_config, adapter_name)
    requested = peft_config is not None or bool(lora_arguments)
    check_batches(module, config, batches, step)
    is_first = record_of(module) is None
    with restored_on_error([module] if batches is not None else []):
        inject_config(module, request, adapt, device, requested=requested)
        if batches is not None:
            run = partial(step or default_step, module)
            initialize_from_batches(module, lambda: batches, run, group_size())
    if is_first or exclude_from_checkpoint is not None:
        note_excluded(module, exclude_from_checkpoint)
    if exclude_from_checkpoint:
        agree_on_excluded(module, group_size(), exclude_from_checkpoint)
    return report(module)


def _config_of(
    peft_config: PeftConfig | Mapping[str, Any] | None, lora_arguments: Mapping[str, Any]
) -> PeftConfig:
    if peft_config is not None and lora_arguments:
        raise ConfigError(
            f"Both `peft_config` and {sorted(lora_arguments)} were given. A ready config is taken "
            "as it is: put these values into it."
        )
    config: PeftConfig
    if peft_config is None:
        config = lora_config(LoRAFields(**lora_arguments))
    else:
        config = as_peft_config(peft_config)
    return config


def inject_config(
    module: nn.Module,
    request: InjectionRequest,
    adapt: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
    requested: bool = True,
) -> None:
    """Does what :func:`inject` does, for a config that was validated."""
    _refuse_finished(request.config)
    adopt_inner_adapters(module)
    record = record_of(module)
    wrapped = find_peft_wrapped(module, () if record is None else record.parts)
    if not wrapped:
        if request.saved is None:
            request = replace(request, config=with_task_heads(request.config, module))
        add_adapters(module, request, adapt, device)
        return
    config_or_none = request.config if requested else None
    check_requested_config(wrapped, config_or_none, adapt, request.adapter_name)
    _take_over(module, wrapped, request.quantization, device)


def with_task_heads(config: PeftConfig, module: nn.Module) -> PeftConfig:
    """Returns ``config`` with the heads of its ``task_type`` in ``modules_to_save``."""
    task = str(to_primitives(config.task_type))
    if task not in _TASK_HEADS or not hasattr(config, "modules_to_save"):
        return config
    there = {name.rpartition(".")[2] for name in base_modules(module)}
    named = list(config.modules_to_save or [])
    added = [head for head in _TASK_HEADS[task] if head in there and head not in named]
    if not added:
        return config
    extended: Any = copy.copy(config)
    extended.modules_to_save = [*named, *added]
    with_heads: PeftConfig = extended
    return with_heads


def _take_over(
    module: nn.Module,
    wrapped: list[PeftWrapped],
    quantization: Any | None,
    device: torch.device | str | None,
) -> None:
    saved = {part.name: list(part.saved) for part in wrapped}
    request = InjectionRequest(wrapped[0].config, quantization, wrapped[0].adapter_name, saved)
    with unwrapped_peft_layers(module, wrapped):
        add_adapters(module, request, [part.name for part in wrapped], device)
    for part in wrapped:
        entry, before = require_record(module).parts[part.name], values_before_training(part)
        entry.taken_over = True
        entry.initial_values |= {key: before[key] for key in entry.initial_values if key in before}


def _refuse_finished(config: PeftConfig) -> None:
    if config.inference_mode:
        raise ConfigError(
            "inference_mode=True: PEFT makes adapters that do not train, as files of finished ones "
            "ask for. Set it to False to train; lightning_peft.load_adapter loads a finished one."
        )


def add_adapters(
    module: nn.Module,
    request: InjectionRequest,
    adapt: str | Iterable[str] | None,
    device: torch.device | str | None = None,
) -> None:
    """Does what :func:`inject` does, for a module that PEFT has not wrapped."""
    refuse_sharded(module, "Adding adapters")
    with loaded_formats(module), exposed_experts(module):
        _add_adapters(module, request, adapt, device)


def _add_adapters(
    module: nn.Module,
    request: InjectionRequest,
    adapt: str | Iterable[str] | None,
    device: torch.device | str | None,
) -> None:
    record = record_of(module) or Record()
    momentum_copies = record.momentum_copies if record.parts else find_momentum_copies(module)
    plans = make_plans(module, request, adapt, record, momentum_copies)
    left = left_modules(module, record.left or {})
    if record_of(module) is None:
        refuse_replacing_adapters((plan.name, plan.part) for plan in plans)
    new = [plan.name for plan in plans if plan.name not in record.parts]
    record.eval_modules |= user_eval_modules(module, new)
    for plan in plans:
        for child in plan.part.modules():
            if child not in left:
                adopt_prequantized(child)
    requires_grad_before = {id(param): param.requires_grad for param in module.parameters()}
    kept = left_parameters(module, left)
    record.active = record.active or (request.adapter_name,)
    for plan in plans:
        entry = _inject_part(plan, request, record, device, kept)
        freeze_base(module, entry, request.biases, plan.targets, requires_grad_before, kept)
        held = [*entry.heads, *entry.saved, *entry.replaced]
        made = resized_embeddings(plan.part, trained_rows(plan.part))
        resized = [name for name in made if not inside(name, held)]
        if resized:
            include_in_files(module, entry, resized)
        activate(plan.part, record.active)
    patch_causal_lm_loss(module, [plan.part for plan in plans])
    if request.quantization is not None:
        release_freed_memory()
    record.momentum_copies = [
        pair
        for pair in momentum_copies
        if _is_adapted(module, pair.copy) and _is_adapted(module, pair.source)
    ]
    link_copies(module, record.momentum_copies, record.frozen, request.adapter_name)
    set_record(module, record)
    replace_save_pretrained(module)


def _is_adapted(module: nn.Module, name: str) -> bool:
    return bool(adapted_layers(module.get_submodule(name)))


def _inject_part(
    plan: InjectionPlan,
    request: InjectionRequest,
    record: Record,
    device: torch.device | str | None,
    kept: frozenset[int],
) -> AdaptedModuleRecord:
    if plan.name not in record.parts:
        record.parts[plan.name] = _new_part_record(plan, request.quantization, kept)
    entry = record.parts[plan.name]
    where = None if device is None else torch.device(device)
    config = _resolved(plan, request.config)
    if plan.in_place is not None:
        inject_in_place(plan, plan.in_place, config, request, where)
    else:
        quantize_layers(plan.part, plan.quantize, request.quantization, where)
        inject_with_peft(plan, config, request.adapter_name)
    for layer, tokens in plan.tokens.items():
        tied = [plan.part.get_submodule(name) for name in tokens.tied]
        attach_tokens(plan.part.get_submodule(layer), request.adapter_name, tokens.rows, tied)
    info = AdapterInfo(config_to_dict(request.config), plan.targets, plan.in_place is not None)
    info.heads, info.rows = plan.heads, plan.rows
    info.needs_data = needs_data(request.config)
    subtracts = plan.in_place is not None and plan.in_place.subtracts_from_base(request.config)
    if subtracts and not info.needs_data:
        made = adapter_file_tensors(plan.part, plan.targets, request.adapter_name)
        info.initial = {key: tensor.detach().cpu().clone() for key, tensor in made.items()}
    entry.adapters[request.adapter_name] = info
    if changes_base(request.config) and not info.needs_data:
        entry.changed_base = stored_fingerprint(plan.part, entry.base.names)
    return entry


def kinds_left_dense(base: Mapping[str, Any]) -> tuple[type[nn.Module], ...]:
    """Returns the kinds of layers that are dense in a quantized base, by what records have."""
    return tuple(kind for key, kind in LATER_KINDS.items() if not base.get(key))


def _new_part_record(
    plan: InjectionPlan, config: Any | None, kept: frozenset[int]
) -> AdaptedModuleRecord:
    part = plan.part
    name, revision = origin_of(getattr(part, "config", None))
    planned = set(plan.quantize)
    quantized = [
        name
        for name, child in part.named_modules()
        if name in planned or (is_quantized(child) and child not in plan.left)
    ]

    layers = [part.get_submodule(name) for name in quantized]
    later = [k for k, kind in LATER_KINDS.items() if any(isinstance(x, kind) for x in layers)]
    named = ((name, param) for name, param in part.named_parameters() if id(param) not in kept)
    loaded = without_new_rows(part, base_fingerprint(part, named))
    return AdaptedModuleRecord(
        name=plan.name,
        base=loaded.only(lambda name: not inside(name, [*plan.heads, *plan.saved])),
        base_id={
            "name_or_path": name,
            "revision": revision,
            "class": type(part).__name__,
            "dtype": _dtype_of(part),
            "vocabulary": vocabulary_size(part),
            **dict.fromkeys(later, True),
            **({GGUF_HASH: part.__dict__[GGUF_HASH]} if GGUF_HASH in part.__dict__ else {}),
        },
        quantized=quantized,
        quantization=quantization_to_dict(config),
        dense_bytes=sum(dense_bytes(part.get_submodule(name)) for name in quantized),
        heads=plan.heads,
        saved=plan.saved,
        loaded=loaded,
        buffers=buffer_checksums(part),
    )


def _dtype_of(part: nn.Module) -> str | None:
    floats = [param.dtype for param in part.parameters() if param.is_floating_point()]
    return str(to_primitives(floats[0])) if floats else None


def _resolved(plan: InjectionPlan, config: PeftConfig) -> PeftConfig:
    """Returns a copy of ``config`` that means exactly the planned layers to PEFT."""
    exact: Any = copy.deepcopy(config)
    behind = projections(plan.part, plan.targets) if plan.in_place is not None else []
    named = [name for name in plan.targets if name not in behind]
    exact.target_modules = "|".join(re.escape(name) for name in named)
    exact.modules_to_save = None
    for apart in ("target_parameters", "trainable_token_indices"):
        if hasattr(exact, apart):
            setattr(exact, apart, None)
    if plan.in_place is not None and hasattr(exact, "fan_in_fan_out"):
        kinds = [isinstance(plan.part.get_submodule(name), Conv1D) for name in plan.targets]
        exact.fan_in_fan_out = all(kinds)
    for field in PATTERN_FIELDS:
        if getattr(exact, field, None):
            setattr(exact, field, _patterns_here(plan.targets, getattr(exact, field)))
    # Already applied when the targets were resolved; PEFT would refuse them with a pattern.
    for applied in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(exact, applied):
            setattr(exact, applied, None)
    resolved: PeftConfig = exact
    return resolved


def _patterns_here(targets: list[str], patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the patterns that match a layer, under the names that layers of experts have here."""
    experts = [name for name in targets if parameter_name(name) != name]
    keys = {name: get_pattern_key([*patterns], parameter_name(name)) for name in experts}
    named = {re.escape(name): patterns[key] for name, key in keys.items() if key in patterns}
    return {**named, **patterns_for(targets, patterns)}

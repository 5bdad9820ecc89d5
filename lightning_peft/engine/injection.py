"""Adding adapters to a module: find, fingerprint, quantize, inject, freeze, record."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.engine.adapters import activate, adapter_parameters
from lightning_peft.engine.configuration import (
    BASE_CHANGING_INITS,
    as_peft_config,
    config_to_dict,
    lora_config,
    quantization_to_dict,
)
from lightning_peft.engine.fingerprint import fingerprint
from lightning_peft.engine.lora import attach
from lightning_peft.engine.parts import LINEAR_LIKE, find_heads, find_parts, output_embeddings
from lightning_peft.engine.quantization import (
    QUANTIZABLE,
    adopt_quantized,
    is_quantized,
    quantize,
)
from lightning_peft.engine.record import AdapterInfo, PartRecord, Record, record_of, set_record
from lightning_peft.engine.reporting import Report, report
from lightning_peft.engine.targets import resolve_saved_modules, resolve_targets
from lightning_peft.errors import ConfigError, LifecycleError, UnsupportedError, itemize


@dataclass
class _Plan:
    """What will be done to one part; made and checked for all parts before any is touched."""

    name: str
    part: nn.Module
    targets: list[str]
    heads: list[str]
    saved: list[str]
    quantize: list[str] = field(default_factory=list)


def inject(
    module: nn.Module,
    peft_config: PeftConfig | Mapping[str, Any] | None = None,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    adapt: str | Iterable[str] | None = None,
    adapter_name: str = "default",
    device: torch.device | str | None = None,
    **lora_arguments: Any,
) -> Report:
    """Adds adapters to ``module`` in place and freezes the rest of the adapted parts.

    The module keeps its identity, its classes and the names of its parameters. Parts that are not
    adapted, and heads, stay as they are. Works on any ``torch.nn.Module``.

    Args:
        module: The module; a LightningModule, a transformers model or your own.
        peft_config: A PEFT config of any method that can be injected, or its fields with a
            ``peft_type``. Without one, ``lora_arguments`` describe LoRA.
        quantization_config: Quantizes the linear layers of the adapted parts first.
        adapt: Names of the submodules to adapt; by default the pretrained ones, else all.
        adapter_name: Name of this adapter. A second call with another name adds a second adapter,
            which is created inactive; see :func:`lightning_peft.set_adapter`.
        device: Where quantization happens, and where the quantized weights stay.
        **lora_arguments: ``r``, ``lora_alpha``, ``target_modules``, ... as in
            :class:`lightning_peft.LoRAStrategy`.

    Returns:
        The report that :func:`lightning_peft.report` gives.

    Raises:
        ConfigError: If the settings cannot work.
        TargetModulesError: If names match nothing; every unmatched name is listed.
        LifecycleError: If the adapter is there already.
        UnsupportedError: If the combination would be wrong in silence.
    """
    if peft_config is not None and lora_arguments:
        raise ConfigError(
            f"Both `peft_config` and {sorted(lora_arguments)} were given. A ready config is taken "
            "as it is: put these values into it."
        )
    config = as_peft_config(
        peft_config if peft_config is not None else lora_config(**lora_arguments)
    )
    record = record_of(module) or Record()
    _check_repeat(record, adapter_name, quantization_config, config)
    plans = _plan(module, config, quantization_config, adapt, record)
    as_left = {n: p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
    for plan in plans:
        _inject_part(plan, record, config, quantization_config, adapter_name, device)
    record.active = record.active or (adapter_name,)
    _set_trainable(plans, record, config, as_left)
    set_record(module, record)
    return report(module)


def _check_repeat(
    record: Record,
    adapter_name: str,
    quantization_config: BitsAndBytesConfig | None,
    config: PeftConfig,
) -> None:
    if adapter_name in record.adapter_names:
        raise LifecycleError(
            f"An adapter called {adapter_name!r} is on the module already. Give the new one "
            "another `adapter_name`."
        )
    if not record.adapter_names:
        return
    if quantization_config is not None and not any(p.quantization for p in record.parts.values()):
        raise LifecycleError(
            "The base was adapted without quantization; quantizing it now would change what the "
            f"adapter {record.adapter_names[0]!r} was trained on. Quantize in the first call."
        )
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise UnsupportedError(
            "`modules_to_save` and `bias` are supported for the first adapter of a module only: "
            "further adapters share one set of base weights."
        )
    if not _in_place(config) or not all(
        info.in_place for part in record.parts.values() for info in part.adapters.values()
    ):
        raise UnsupportedError(
            "Several adapters on one base are supported for LoRA only; "
            f"{type(config).__name__} rewrites the layers in its own way."
        )


def _plan(
    module: nn.Module,
    config: PeftConfig,
    quantization_config: BitsAndBytesConfig | None,
    adapt: str | Iterable[str] | None,
    record: Record,
) -> list[_Plan]:
    parts = find_parts(module, list(record.parts) if record.parts and adapt is None else adapt)
    plans = []
    for name, part in parts.items():
        where = name or type(part).__name__
        targets = resolve_targets(part, config, where)
        saved = resolve_saved_modules(part, getattr(config, "modules_to_save", None) or [], where)
        _check_ties(part, saved, where)
        heads = [
            head
            for head in find_heads(part)
            if not any(_inside(target, [head]) for target in targets) and head not in saved
        ]
        plan = _Plan(name, part, targets, heads, saved)
        if quantization_config is not None and name not in record.parts:
            plan.quantize = _quantizable(part, plan, quantization_config)
        plans.append(plan)
    return plans


def _check_ties(part: nn.Module, saved: list[str], where: str) -> None:
    names: dict[int, list[str]] = {}
    for name, param in part.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    problems = []
    for shared in names.values():
        inside = [n for n in shared if _inside(n, saved)]
        if inside and len(inside) != len(shared):
            outside = [n for n in shared if n not in inside]
            problems.append(f"{inside[0]} is tied to {', '.join(outside)}")
    if problems:
        raise ConfigError(
            f"`modules_to_save` names one side of tied weights of {where}:"
            + itemize(problems)
            + "\nTraining one side trains the other, and an adapter file with one side would "
            "restore another model. Name both sides, or untie them "
            "(tie_word_embeddings=False)."
        )


def _quantizable(part: nn.Module, plan: _Plan, config: BitsAndBytesConfig) -> list[str]:
    output = output_embeddings(part)
    skip = [*plan.heads, *plan.saved, *(config.llm_int8_skip_modules or [])]
    owners: dict[int, int] = {}
    for child in part.modules():
        for param in child.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    return [
        name
        for name, child in part.named_modules()
        if type(child) in QUANTIZABLE
        and child is not output
        and not _inside(name, skip)
        and not any(name.endswith(f".{suffix}") for suffix in skip)
        and owners[id(child.weight)] == 1
        and child.weight.is_floating_point()
    ]


def _in_place(config: PeftConfig) -> bool:
    """Says whether the adapter has a form that lives on the layer itself."""
    return type(config) is LoraConfig and not (
        config.use_dora
        or config.lora_bias
        or config.target_parameters
        or config.trainable_token_indices
        or config.layer_replication
        or config.megatron_config
        or config.init_lora_weights in ("eva", "mica")
        or any(
            bool(getattr(config, name, None))
            for name in (
                "alora_invocation_tokens",
                "arrow_config",
                "use_bdlora",
                "velora_config",
                "monteclora_config",
                "kasa_config",
                "use_qalora",
            )
        )
    )


class _InPlaceLoraModel(LoraModel):
    """PEFT's LoRA tuner, except that a made layer hands its adapter to the layer it was made for.

    PEFT matches, creates and initialises; only the last step, replacing the child in its parent,
    is another one.
    """

    quantize_with: tuple[BitsAndBytesConfig, torch.device | None] | None = None
    quantize_names: frozenset[str] = frozenset()
    part_names: Mapping[int, str] = {}

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # After PEFT's init, which may need the dense weight, and before the adapter moves over.
        if self.quantize_with is not None and self.part_names[id(child)] in self.quantize_names:
            quantize(child, *self.quantize_with)
        attach(child, new_module, next(reversed(self.peft_config)))

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezing is done once for the whole part, by this package's own rules."""


def _inject_part(
    plan: _Plan,
    record: Record,
    config: PeftConfig,
    quantization_config: BitsAndBytesConfig | None,
    adapter_name: str,
    device: torch.device | str | None,
) -> None:
    part = plan.part
    where = None if device is None else torch.device(device)
    if plan.name not in record.parts:
        record.parts[plan.name] = _new_part_record(plan, quantization_config)
    entry = record.parts[plan.name]
    in_place = _in_place(config) and all(
        isinstance(part.get_submodule(name), LINEAR_LIKE) for name in plan.targets
    )
    for child in list(part.modules()):
        adopt_quantized(child)
    exact = copy.deepcopy(config)
    exact.target_modules = "|".join(re.escape(name) for name in plan.targets)  # type: ignore[attr-defined]
    exact.modules_to_save = None  # type: ignore[attr-defined]
    if in_place and all(isinstance(part.get_submodule(n), Conv1D) for n in plan.targets):
        exact.fan_in_fan_out = True  # type: ignore[attr-defined]
    # Already applied when the targets were resolved; PEFT would refuse them beside a pattern.
    for resolved in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if hasattr(exact, resolved):
            setattr(exact, resolved, None)
    if in_place:
        _attach_in_place(part, plan, exact, quantization_config, adapter_name, where)
    else:
        _quantize_layers(part, plan.quantize, quantization_config, where)
        _wrap_by_peft(part, exact, adapter_name, config)
    entry.adapters[adapter_name] = AdapterInfo(config_to_dict(config), plan.targets, in_place)
    init = str(getattr(config, "init_lora_weights", "")).lower()
    if init.startswith(BASE_CHANGING_INITS):
        entry.changed_base = fingerprint(
            (name, _base_param(part, name)) for name in entry.base.names
        )


def _new_part_record(plan: _Plan, quantization_config: BitsAndBytesConfig | None) -> PartRecord:
    part = plan.part
    trained = [*plan.heads, *plan.saved]
    base = fingerprint(
        (name, param) for name, param in part.named_parameters() if not _inside(name, trained)
    )
    config = getattr(part, "config", None)
    already = [name for name, child in part.named_modules() if is_quantized(child)]
    layers = [part.get_submodule(name) for name in plan.quantize]
    return PartRecord(
        name=plan.name,
        base=base,
        base_id={
            "name_or_path": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
        },
        quantized=[*already, *plan.quantize],
        quantization=quantization_to_dict(quantization_config),
        dense_bytes=sum(x.weight.numel() * x.weight.element_size() for x in layers),
        heads=plan.heads,
        saved=plan.saved,
    )


def _attach_in_place(
    part: nn.Module,
    plan: _Plan,
    config: PeftConfig,
    quantization_config: BitsAndBytesConfig | None,
    adapter_name: str,
    device: torch.device | None,
) -> None:
    # A class of its own per call: PEFT injects inside the constructor, before attributes exist.
    settings = {
        "quantize_with": None if quantization_config is None else (quantization_config, device),
        "quantize_names": frozenset(plan.quantize),
        "part_names": {id(child): name for name, child in part.named_modules()},
    }
    tuner = type("InPlaceLoraModel", (_InPlaceLoraModel,), settings)
    tuner(part, config, adapter_name=adapter_name)
    # PEFT leaves its config on the model as a mark of wrapped layers, and there are none.
    del part.peft_config
    rest = [name for name in plan.quantize if name not in set(plan.targets)]
    _quantize_layers(part, rest, quantization_config, device)


def _quantize_layers(
    part: nn.Module,
    names: list[str],
    config: BitsAndBytesConfig | None,
    device: torch.device | None,
) -> None:
    for name in names:
        assert config is not None
        quantize(part.get_submodule(name), config, device)


def _wrap_by_peft(
    part: nn.Module, config: PeftConfig, adapter_name: str, asked: PeftConfig
) -> None:
    # PEFT picks its wrappers for quantized layers only when the model says so.
    for bits, kind in ((4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)):
        if any(isinstance(layer, kind) for layer in part.modules()):
            setattr(part, f"is_loaded_in_{bits}bit", True)
    try:
        inject_adapter_in_model(config, part, adapter_name)
    except ValueError as error:
        raise UnsupportedError(
            f"PEFT cannot inject {type(asked).__name__} into {type(part).__name__}: {error}"
        ) from error


def _base_param(part: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    layer = part.get_submodule(owner)
    layer = getattr(layer, "base_layer", layer)
    param = layer._parameters[leaf]
    assert param is not None
    return param


def _set_trainable(
    plans: list[_Plan],
    record: Record,
    config: PeftConfig,
    as_left: dict[str, bool],
) -> None:
    biases = getattr(config, "bias", "none")
    for plan in plans:
        entry = record.parts[plan.name]
        adapters = adapter_parameters(plan.part)
        frozen: set[str] = set()
        for name, param in plan.part.named_parameters(remove_duplicate=False):
            if name in adapters:
                continue
            if _inside(name, entry.saved) or _is_trained_bias(name, biases, plan.targets):
                param.requires_grad_(True)
            elif _inside(name, entry.heads):
                param.requires_grad_(as_left[entry.qualified(name)])
            else:
                param.requires_grad_(False)
                frozen.add(entry.qualified(name))
        entry.frozen = frozen
        if len(entry.adapters) == 1:
            entry.originals = {
                name: param.detach().cpu().clone()
                for name, param in plan.part.named_parameters()
                if _inside(name, entry.saved) or _is_trained_bias(name, biases, plan.targets)
            }
        activate(plan.part, record.active)


def _inside(name: str, owners: Iterable[str]) -> bool:
    return any(name == owner or name.startswith(f"{owner}.") for owner in owners)


def _is_trained_bias(name: str, biases: str, targets: list[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    if leaf != "bias" or biases == "none":
        return False
    return biases == "all" or owner.removesuffix(".base_layer") in targets

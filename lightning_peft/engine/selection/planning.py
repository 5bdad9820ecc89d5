"""Injection plan of a module: adapt, quantize, freeze or train each part.

Plans for all parts are made and checked before any part is touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.engine.adapters import trained_heads
from lightning_peft.engine.backends.registry import backend_for, is_quantized, quantization_to_dict
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.attention import with_projections
from lightning_peft.engine.layers.expert_weights import ExpertWeight, weight_name
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, has_quantizable_class
from lightning_peft.engine.layers.mixin import weight_key
from lightning_peft.engine.layers.recurrent import stores_weight
from lightning_peft.engine.layers.sizes import refuse_uninitialized
from lightning_peft.engine.methods.base import InPlaceMethod
from lightning_peft.engine.methods.lora_config import changes_base
from lightning_peft.engine.methods.registry import in_place_method, method_of
from lightning_peft.engine.record import AdaptedModuleRecord, MomentumCopy, Record
from lightning_peft.engine.selection.adapter_names import adapter_attributes, check_adapter_name
from lightning_peft.engine.selection.initialization import initialization_problems
from lightning_peft.engine.selection.parameters import is_own_float, skip_names
from lightning_peft.engine.selection.parts import (
    Exclusions,
    find_heads,
    inside,
    output_embeddings,
    parameter_holders,
    parameter_names,
)
from lightning_peft.engine.selection.rows import Rows, without_rows
from lightning_peft.engine.selection.scope import (
    Selection,
    left_modules,
    select,
    unused_modules,
)
from lightning_peft.engine.selection.targets import (
    check_names_match,
    resolve_saved_modules,
    resolve_targets,
    rows_of,
)
from lightning_peft.engine.selection.tokens import Tokens, conflicts, requested_tokens
from lightning_peft.engine.selection.unsupported_layers import (
    refuse_stored_formats,
    self_modified_layers,
    unread_weights,
    wrapping_problems,
)
from lightning_peft.errors import (
    ConfigError,
    LifecycleError,
    TargetModulesError,
    UnsupportedError,
    itemize,
)


@dataclass
class InjectionRequest:
    """What the caller of ``inject`` asked for.

    Attributes:
        config: PEFT's config.
        quantization: How to quantize the base first, or ``None``.
        adapter_name: Name of the new adapter.
        saved: Names of the modules that are trained in full, by part, where they are known
            exactly; else they are those that ``config`` means.
        rows: The same of rows of layers, by part and layer.
        dense_kinds: Kinds of layers that are not quantized, as before they could be.
        dense: Names of further weights, in the part, that are not quantized.
    """

    config: PeftConfig
    quantization: Any | None
    adapter_name: str = "default"
    saved: dict[str, list[str]] | None = None
    rows: dict[str, dict[str, Rows]] | None = None
    dense_kinds: tuple[type[nn.Module], ...] = ()
    dense: frozenset[str] = frozenset()

    @property
    def biases(self) -> str:
        """Which biases are trained: ``"none"``, ``"all"`` or ``"lora_only"``."""
        return str(getattr(self.config, "bias", "none"))


@dataclass
class InjectionPlan:
    """What will be done to one part.

    Attributes:
        name: Dotted name inside the module; ``""`` is the module itself.
        part: The submodule.
        targets: Names of the layers that get an adapter, relative to the part.
        saved: Names of the modules that are trained in full.
        heads: Names of the heads that stay as the user left them.
        quantize: Names of the layers to quantize first.
        in_place: The method by which layers are extended in place; ``None`` where PEFT wraps them.
        left: Submodules of the module that stay as they are; some may be inside of the part.
        rows: The rows of the output that get an adapter, by layer, where it is not all.
        tokens: The rows of embeddings that train, by layer.
    """

    name: str
    part: nn.Module
    targets: list[str]
    saved: list[str]
    heads: list[str] = field(default_factory=list)
    quantize: list[str] = field(default_factory=list)
    in_place: InPlaceMethod | None = None
    left: frozenset[nn.Module] = frozenset()
    rows: dict[str, Rows] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)


def make_plans(
    module: nn.Module,
    request: InjectionRequest,
    adapt: str | Iterable[str] | None,
    record: Record,
    momentum_copies: Collection[MomentumCopy] = (),
) -> list[InjectionPlan]:
    """Returns the plan of every part of ``module``; changes nothing but ``record.left``."""
    check_adapter_name(request.adapter_name)
    again = list(record.parts) if record.parts and adapt is None else adapt
    wanted = getattr(without_rows(request.config), "target_modules", None)
    selection = select(module, again, wanted, momentum_copies)
    if record.left is not None:
        selection = recorded_selection(module, record, selection)
    parts, exclusions = selection.parts, selection.exclusions
    for name in parts:
        if name in record.parts:
            _check_additional_adapter(record.parts[name], request)
        else:
            _refuse_overlap(name, record)
    refuse_stored_formats(module, parts)
    refuse_uninitialized(parts)
    targets = resolve_targets(parts, request.config, exclusions)
    saved = request.saved
    if saved is None:
        named = getattr(request.config, "modules_to_save", None) or []
        saved = resolve_saved_modules(parts, named, targets, exclusions)
    plans = [
        InjectionPlan(n, p, targets[n], saved[n], left=exclusions.left) for n, p in parts.items()
    ]
    tokens = requested_tokens(module, parts, request.config)
    for plan in plans:
        plan.tokens = tokens[plan.name]
        _check_ties(plan)
        plan.in_place = _in_place_method(plan, request.config)
        if plan.in_place is not None:
            plan.targets = with_projections(plan.part, plan.targets)
        plan.heads = [
            head
            for head in find_heads(plan.part, exclusions)
            if not inside(head, plan.saved) and not any(inside(t, [head]) for t in plan.targets)
        ]
        if plan.name in record.parts:
            _check_trained_heads(plan, record.parts[plan.name])
        else:
            plan.quantize = _to_quantize(plan, request)
        _check_layers(plan, request)
    _check_distinct(plans)
    _check_quantization([plan for plan in plans if plan.name not in record.parts], request)
    record.left = selection.left
    return plans


def recorded_selection(
    module: nn.Module, record: Record, found: Selection | None = None
) -> Selection:
    """Returns the selection that ``record`` says, by names and not by what is frozen now.

    Args:
        module: The module that the record is of.
        record: The record, or one that has nothing but ``left``.
        found: The parts to adapt, and what is on top of them where nothing is adapted yet; by
            default those of the record.
    """
    parts = found.parts if found else {name: module.get_submodule(name) for name in record.parts}
    left = {
        name: reason
        for name, reason in (record.left or {}).items()
        if not any(inside(part, [name]) for part in parts)
    }
    heads = [entry.qualified(head) for entry in record.parts.values() for head in entry.heads]
    new_heads = frozenset(module.get_submodule(name) for name in heads)
    if found and not record.parts:
        new_heads = found.exclusions.new_heads
    exclusions = Exclusions(left_modules(module, left), new_heads, unused=unused_modules(module))
    return Selection(parts, left, exclusions)


def _check_additional_adapter(entry: AdaptedModuleRecord, request: InjectionRequest) -> None:
    name, config = request.adapter_name, request.config
    where = entry.name or "the module"
    if name in entry.adapters:
        raise LifecycleError(
            f"An adapter called {name!r} is on {where} already. Give the new one another "
            "`adapter_name`."
        )
    wanted = quantization_to_dict(request.quantization)
    if wanted is not None and wanted != entry.quantization:
        raise LifecycleError(
            f"The base of {where} was adapted with quantization={entry.quantization}; quantizing "
            f"it as {wanted} now would change what the adapter {next(iter(entry.adapters))!r} was "
            "trained on. Use the same quantization in both calls."
        )
    method = in_place_method(config)
    others = entry.adapters.values()
    if not (method and method.adds_up) or not all(
        other.in_place and method_of(other.config) is method for other in others
    ):
        raise UnsupportedError(
            "Several adapters on one base are supported for LoRA in place only, all with "
            "`use_dora` or none; "
            f"{type(config).__name__} with these settings rewrites the layers in its own way."
        )
    if entry.initial_values or getattr(config, "modules_to_save", None) or request.biases != "none":
        raise UnsupportedError(
            "`modules_to_save` and `bias` are supported for the only adapter of a part: there is "
            "one set of base weights for all adapters, so another one would run with weights that "
            "it was not trained with."
        )
    if changes_base(config) or any(changes_base(other.config) for other in others):
        raise UnsupportedError(
            "An initialisation that rewrites the base (pissa, olora, corda, loftq, lora_ga) is "
            "supported for the only adapter of a part: the others would run on a base that they "
            "were not made for."
        )


def _check_trained_heads(plan: InjectionPlan, entry: AdaptedModuleRecord) -> None:
    """Refuses an adapter on a head that is trained in full with the adapters that are there."""
    heads = trained_heads(plan.part, entry.heads)
    problems = [target for target in plan.targets if inside(target, heads)]
    if problems:
        raise UnsupportedError(
            f"{', '.join(problems)} of {_display_name(plan)} belongs to a head that is trained in "
            f"full with the adapter {next(iter(entry.adapters))!r}. An adapter on it would be one "
            "for weights that change. Freeze the head first (requires_grad_(False)), or leave it "
            "out of `target_modules`."
        )


def _refuse_overlap(name: str, record: Record) -> None:
    for other in record.parts:
        if inside(name, [other]) or inside(other, [name]):
            raise LifecycleError(
                f"{name or 'the module'!r} overlaps {other or 'the module'!r}, which was adapted "
                "as a part of its own. Name the same parts in every call."
            )


def _check_ties(plan: InjectionPlan) -> None:
    problems = []
    for shared in parameter_names(plan.part).values():
        within = [name for name in shared if inside(name, plan.saved)]
        outside = [name for name in shared if name not in within]
        if within and outside:
            problems.append(f"{within[0]} is tied to {', '.join(outside)}")
    if problems:
        raise ConfigError(
            f"`modules_to_save` names one side of tied weights of {_display_name(plan)}:"
            + itemize(problems)
            + "\nTraining one side trains the other, and an adapter file with one side would "
            "restore another model. Name both sides, or untie them "
            "(tie_word_embeddings=False)."
        )


def _display_name(plan: InjectionPlan) -> str:
    return plan.name or type(plan.part).__name__


def _to_quantize(plan: InjectionPlan, request: InjectionRequest) -> list[str]:
    layers = {n: plan.part.get_submodule(n) for n in layers_to_quantize(plan, request.quantization)}
    names = [n for n, layer in layers.items() if not isinstance(layer, request.dense_kinds)]
    return [n for n in names if weight_name(n, weight_key(layers[n])) not in request.dense]


def layers_to_quantize(plan: InjectionPlan, config: Any | None) -> list[str]:
    """Returns the names of the layers of a part that injection quantizes first."""
    if config is None:
        return []
    output, holders = output_embeddings(plan.part), parameter_holders(plan.part)
    backend = backend_for(config)
    # PEFT's wrappers for them compute with dense weights.
    dense = () if plan.in_place else (*CONVOLUTION_LIKE, nn.MultiheadAttention)
    skip = [*plan.heads, *plan.saved, *backend.skip_modules(config)]
    targets, rewritten = set(plan.targets), self_modified_layers(plan.part)
    return [
        name
        for name, child in plan.part.named_modules()
        if name not in rewritten
        and has_quantizable_class(child)
        and not isinstance(child, dense)
        and getattr(child, "owner", child) not in plan.left
        and (not isinstance(child, ExpertWeight) or backend.takes_experts(child))
        # Elsewhere convolutions are small and sensitive, as in the first layer of a speech model.
        and (not isinstance(child, CONVOLUTION_LIKE) or name in targets)
        and backend.mixin_for(child) is not None
        and child is not output
        and not inside(name, skip)
        and not any(known.endswith(f".{suffix}") for suffix in skip for known in skip_names(name))
        and is_own_float(child._parameters.get(weight_key(child)), holders)
    ]


def _in_place_method(plan: InjectionPlan, config: PeftConfig) -> InPlaceMethod | None:
    method = in_place_method(config)
    layers = [plan.part.get_submodule(name) for name in plan.targets]
    if method and all(method.layer_class(layer) and stores_weight(layer) for layer in layers):
        return method
    return None


def _check_layers(plan: InjectionPlan, request: InjectionRequest) -> None:
    layers = {name: plan.part.get_submodule(name) for name in plan.targets}
    in_place = plan.in_place is not None
    rows, problems = rows_of(plan.part, plan.targets, request.config)
    plan.rows = rows if request.rows is None else request.rows.get(plan.name, {})
    apart = [*plan.saved, *plan.heads, *plan.quantize]
    problems += conflicts(plan.part, plan.tokens, plan.targets, apart) + unread_weights(layers)
    problems += initialization_problems(
        layers, request.config, parameter_holders(plan.part), in_place, request.quantization
    )
    problems += [
        f"{name}: {rewriter} changes its weight in place while it runs. Leave it out by "
        "`exclude_modules`"
        for name, rewriter in self_modified_layers(plan.part).items()
        if name in layers
    ]
    if plan.in_place is None:
        problems += wrapping_problems(
            plan.part, plan.targets, plan.quantize, request.config, request.quantization
        )
    for name, layer in layers.items():
        reason = method_of(request.config).unsupported_reason(layer, name, request.config, in_place)
        problems += [f"{name}: {reason}"] if reason else []
        own = () if isinstance(layer, AdapterLayer) else adapter_attributes(layer, plan.in_place)
        problems += [
            f"{name} ({type(layer).__name__}) has adapters of its own: `{attribute}`"
            for attribute in own
        ]
    for name in plan.quantize:
        backend = backend_for(request.quantization)
        reason = backend.unsupported_reason(plan.part.get_submodule(name))
        problems += [f"{name} cannot be quantized: {reason}"] if reason else []
    if problems:
        raise UnsupportedError(
            f"{type(request.config).__name__} with these settings does not work on "
            f"{_display_name(plan)}:" + itemize(problems, 5)
        )


def _check_quantization(plans: list[InjectionPlan], request: InjectionRequest) -> None:
    if request.quantization is None or not plans:
        return
    parts = {plan.name: plan.part for plan in plans}
    backend = backend_for(request.quantization)
    check_names_match(backend.skip_argument, backend.skip_modules(request.quantization), parts)
    already = any(
        is_quantized(child) and child not in plan.left
        for plan in plans
        for child in plan.part.modules()
    )
    if not already and not any(layers_to_quantize(plan, request.quantization) for plan in plans):
        raise UnsupportedError(
            f"Nothing to quantize in {', '.join(map(_display_name, plans))}: there is no linear "
            "layer besides heads, saved modules and tied weights, and no adapted convolution "
            "(4-bit); other layers are not quantized. Use LoRAStrategy, or inject without a "
            "quantization config."
        )


def _check_distinct(plans: list[InjectionPlan]) -> None:
    owners: dict[int, str] = {}
    problems = []
    for plan in plans:
        for target in plan.targets:
            name = f"{plan.name}.{target}".lstrip(".")
            owner = owners.setdefault(id(plan.part.get_submodule(target)), name)
            problems += [] if owner == name else [f"{name} is {owner}"]
    if problems:
        raise TargetModulesError(
            "Two parts share layers, which would get one adapter twice:"
            + itemize(problems)
            + "\nName one of the parts in `adapt`."
        )

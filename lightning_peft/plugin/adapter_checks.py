"""Checks of an adapted module before training; all problems are reported at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from lightning_peft import engine
from lightning_peft.compat.lightning import pruned_parameters, start_method_of, trainer_of
from lightning_peft.errors import BaseMismatchError, LifecycleError, UnsupportedError, itemize
from lightning_peft.plugin.averaging import AVERAGING_CALLBACKS
from lightning_peft.plugin.unfreezing import finetuning_problems

# By name, since each Lightning package has its own classes.
REFUSED_CALLBACKS = {
    "QuantizationAwareTraining": "it replaces layers of the frozen base, which no checkpoint holds",
}
PRUNING_CALLBACK = "ModelPruning"


if TYPE_CHECKING:
    from torch import nn

    from lightning_peft.plugin.injection_settings import InjectionSettings

log = logging.getLogger(__name__)


def check_existing_adapters(module: nn.Module, settings: InjectionSettings) -> None:
    """Compares adapters that are there already with the ones that were asked for."""
    record = engine.require_record(module)
    requested = engine.config_to_dict(settings.peft_config)
    quantization = engine.quantization_to_dict(settings.quantization_config)
    aside = engine.recorded_selection(module, record).exclusions
    problems = []
    # These were given other ranks when they got their first batches.
    moved = engine.needs_data(settings.peft_config)
    if settings.adapt is not None and set(settings.adapt) != set(record.parts):
        problems.append(f"adapt={sorted(record.parts)}, asked for {settings.adapt}")
    for name, part in record.parts.items():
        where = name or type(module).__name__
        info = part.adapters[record.active[0]]
        if part.quantization != quantization:
            problems.append(
                f"{where}: quantization is {part.quantization}, asked for {quantization}"
            )
        if part.taken_over and not settings.adapters_configured:
            continue
        problems += [
            f"{where}: {key}={info.config.get(key)!r}, asked for {requested.get(key)!r}"
            for key in (*engine.config_differences(info.config, requested), "lora_dropout")
            if info.config.get(key) != requested.get(key)
            and not (moved and key in ("rank_pattern", "alpha_pattern"))
        ]
        if not moved:
            problems += _target_differences(
                module.get_submodule(name), part, info, aside, settings.peft_config
            )
    if problems:
        raise LifecycleError(
            "The module has adapters already, with other settings than were asked for:"
            + itemize(problems)
            + "\nAsk for the same settings, or build the module again."
        )


def _target_differences(
    part: nn.Module, entry: Any, info: Any, aside: Any, config: Any
) -> list[str]:
    if not info.in_place:
        # Inside PEFT's wrappers the layers have other names.
        return []
    with engine.exposed_experts(part):
        named = engine.resolve_targets({entry.name: part}, config, aside)[entry.name]
        requested = engine.with_projections(part, named)
    missing = sorted({*requested} - {*info.targets})
    surplus = sorted({*info.targets} - {*requested})
    rows, _ = engine.rows_of(part, info.targets, config)
    others = sorted(name for name in info.targets if rows.get(name) != info.rows.get(name))
    return [
        *(f"{entry.qualified(name)}: no adapter, asked for one" for name in missing),
        *(f"{entry.qualified(name)}: has an adapter, not asked for" for name in surplus),
        *(f"{entry.qualified(name)}: other rows were asked for" for name in others),
    ]


def check_frozen(module: nn.Module) -> None:
    """The base must be as frozen as injection left it: checkpoints do not hold it."""
    record = engine.require_record(module)
    replaced = missing_layers(module, record)
    if replaced:
        raise LifecycleError(
            "Trained adapters were thrown away:"
            + itemize((f"{name}: {engine.REPLACED}" for name in replaced), 5)
        )
    params = dict(module.named_parameters(remove_duplicate=False))
    frozen = sorted(record.frozen)
    gone = [name for name in frozen if name not in params]
    if gone:
        raise LifecycleError(
            "These weights of the base were taken away after the adapters were added:"
            + itemize(gone, 5)
            + "\nPruning, weight and spectral norm and other parametrizations put others in "
            "their place, and no checkpoint would hold them. Apply them before the fit."
        )
    trained = [name for name in frozen if params[name].requires_grad]
    if trained:
        raise LifecycleError(
            "These weights of the base were unfrozen after the adapters were added:"
            + itemize(trained, 5)
            + "\nNo checkpoint would hold what they learn. Leave them frozen, or name the "
            "layers to train in full in `modules_to_save`."
        )


def check_optimizers(module: nn.Module, optimizers: list[Any]) -> None:
    """Every trainable adapter must be in an optimizer, and no optimizer without anything."""
    record = engine.require_record(module)
    held = engine.held_ids(optimizers)
    problems, idle = [], []
    for name, part in record.parts.items():
        named = engine.trained_parameters(module.get_submodule(name), part)
        missing = [part.qualified(n) for n, p in named.items() if id(p) not in held]
        missing = [n for n in missing if not engine.inside(n, record.unoptimized)]
        if missing:
            problems.append(
                f"{len(missing)} of {len(named)} trainable tensors of "
                f"{name or type(module).__name__} are in no optimizer, such as {missing[0]!r}"
            )
            idle += [name] if len(missing) == len(named) and name else []
    registered = {id(param) for param in module.parameters()}
    for index, optimizer in enumerate(optimizers):
        trained = [param for param in engine.held_parameters(optimizer) if param.requires_grad]
        unsaved = sum(id(param) not in registered for param in trained)
        if not trained:
            problems.append(
                f"optimizer {index} ({type(optimizer).__name__}) holds only frozen parameters"
            )
        elif unsaved:
            log.warning(
                "optimizer %d (%s) trains %d tensors that are not parameters of the module, such "
                "as those of layers in a Python list: no checkpoint holds them. Make them "
                "attributes of the module, or use nn.ModuleList.",
                index,
                type(optimizer).__name__,
                unsaved,
            )
    if problems and optimizers:
        raise LifecycleError(
            "configure_optimizers does not see the adapters:"
            + itemize(problems)
            + "\nPass self.parameters(), or filter by `p.requires_grad`, inside "
            "configure_optimizers. An optimizer that holds the weight of a layer gets its "
            "adapters too, and none holds the weights of these."
            + (f" {exclusion_advice(idle, record.parts)}".rstrip() if idle else "")
        )


def missing_layers(module: nn.Module, record: Any) -> list[str]:
    """Returns the names of the layers that had adapters and have none now."""
    gone = []
    for name, part in record.parts.items():
        try:
            layers = engine.adapted_layers(module.get_submodule(name))
        except AttributeError:
            layers = {}
        targets = {t for info in part.adapters.values() for t in info.targets}
        gone += [part.qualified(t) for t in sorted(targets) if t not in layers]
    return gone


def check_same_base_on_all_ranks(module: nn.Module, processes: int) -> None:
    """Compares the frozen bases of all ranks: DDP broadcasts packed bytes, not constants."""
    record = engine.require_record(module)
    mine = {
        part.qualified(name): total
        for part in record.parts.values()
        for name, (_, total) in part.base.tensors.items()
    }
    everyone = engine.gathered(mine, processes)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if not others:
        return
    first, other = everyone[0], everyone[others[0]]
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    raise BaseMismatchError(
        f"Ranks {others} have another base model than rank 0:"
        + itemize(names, 5)
        + "\nNeither quantized nor sharded weights are broadcast, so ranks would train against "
        "different weights, and no checkpoint has those of all. "
        "Load the same checkpoint on every rank, or call seed_everything(...) before a base "
        "with random weights is built."
    )


def check_trainable(module: nn.Module) -> None:
    """Refuses merged and frozen adapters."""
    record = engine.require_record(module)
    parts = [(entry, module.get_submodule(name)) for name, entry in record.parts.items()]
    merged = [
        entry.qualified(name)
        for entry, part in parts
        for name, layer in engine.adapted_layers(part).items()
        if layer.merged_adapters
    ]
    if merged:
        raise LifecycleError(
            "These layers have their adapters merged, so nothing would train:"
            + itemize(merged, 5)
            + "\nCall lightning_peft.unmerge(module) first."
        )
    copies = [pair.copy for pair in record.momentum_copies]
    frozen = [
        entry.name or type(part).__name__
        for entry, part in parts
        if not engine.trained_parameters(part, entry) and not engine.inside(entry.name, copies)
    ]
    if frozen:
        raise LifecycleError(
            f"The adapters on {', '.join(frozen)} are frozen, so nothing of them would train. Load "
            "them by load_adapter(..., is_trainable=True), or activate them by set_adapter."
        )


def warn_unregistered_copies(module: nn.Module, outside: dict[str, str]) -> None:
    """Warns of copies of adapted parts that the module does not register."""
    for where, name in outside.items():
        if engine.adapted_layers(module.get_submodule(name)):
            log.warning(
                "%s is a copy of %r that the module does not register. It gets no adapters, and a "
                "loop over the parameters() of both does not line up. Where it is to follow, as a "
                "momentum copy does, make it an attribute of the module.",
                where,
                name,
            )


def exclusion_advice(idle: Collection[str], parts: Iterable[str]) -> str:
    """Returns which setting leaves the parts ``idle`` as they are; ``""`` is the module itself."""
    others = [name for name in parts if name not in idle]
    if "" in idle:
        return "Adapt the submodules that are trained, by name in `adapt`. "
    names = " and ".join(repr(name) for name in idle)
    if others:
        return (
            f"To leave {names} without adapters, freeze what is not trained by "
            f"requires_grad_(False) in `__init__`, or pass adapt={others!r}. "
        )
    return (
        f"To leave {names} as the module froze it, and to adapt the other layers of the module, "
        "pass adapt=''; `exclude_modules` takes single layers out. "
    )


def check_compatibility(module: Any, strategy: Any, quantized: bool) -> None:
    """Looks at the strategy, its devices and plugins, and the callbacks."""
    problems = []
    precisions = {cls.__name__ for cls in type(strategy.precision_plugin).__mro__}
    if "BitsandbytesPrecision" in precisions:
        problems.append(
            "plugins=BitsandbytesPrecision: it would quantize the adapters too and freeze "
            "everything. Remove it: QLoRAStrategy quantizes the base itself"
        )
    if "DoublePrecision" in precisions and quantized:
        problems.append(
            "precision='64-true': products with quantized weights are computed in 16 and 32 bits. "
            "Use another precision, or LoRA without quantization"
        )
    devices = getattr(strategy, "parallel_devices", None) or [strategy.root_device]
    problems += [
        f"device {kind!r}: neither bitsandbytes' kernels nor the adapters were ever tested "
        "there. Use accelerator='gpu' or 'cpu'"
        for kind in sorted({device.type for device in devices} & {"mps", "xla"})
    ]
    start_method = start_method_of(strategy)
    if start_method != "popen":
        problems.append(
            f"start_method={start_method!r}: the trained adapters would stay in the processes "
            "it starts and be lost with them. Use strategy='ddp', from a script"
        )
    callbacks = getattr(trainer_of(module), "callbacks", [])
    processes = len(devices) * getattr(strategy, "num_nodes", 1)
    problems += finetuning_problems(callbacks, processes, AVERAGING_CALLBACKS)
    for callback in callbacks:
        problems += [
            f"callback {type(callback).__name__}: {REFUSED_CALLBACKS[cls.__name__]}. Remove it"
            for cls in type(callback).__mro__
            if cls.__name__ in REFUSED_CALLBACKS
        ]
    if problems:
        raise UnsupportedError("Adapters cannot be trained together with:" + itemize(problems))


def check_pruning(module: Any) -> None:
    """Looks at what Lightning's pruning callbacks have chosen, once adapters are there."""
    params = dict(module.named_parameters(remove_duplicate=False))
    frozen = {id(params[n]): n for n in engine.require_record(module).frozen if n in params}
    problems = []
    for callback in getattr(trainer_of(module), "callbacks", []):
        if PRUNING_CALLBACK not in [cls.__name__ for cls in type(callback).__mro__]:
            continue
        chosen = [layer._parameters.get(name) for layer, name in pruned_parameters(callback)]
        names = [frozen[id(param)] for param in chosen if id(param) in frozen]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(
                f"callback {type(callback).__name__}, which would change weights of the frozen "
                f"base: {', '.join(names[:3])}{more}. No checkpoint holds them. Prune before the "
                "fit, or name layers that train in full in its `parameters_to_prune`, such as a "
                "head"
            )
    if problems:
        raise UnsupportedError("Adapters cannot be trained together with:" + itemize(problems))

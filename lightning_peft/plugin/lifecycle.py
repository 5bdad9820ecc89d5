"""The order of things, written once.

build (``__init__``, ``setup``, ``configure_model``) -> quantize and inject -> restore -> wrap ->
optimizers -> train. The one place that comes after every way to build and before the restore is
the end of ``configure_model``, so that hook is wrapped on the instance, for one call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import trainer_of
from lightning_peft.errors import BaseMismatchError, LifecycleError, itemize
from lightning_peft.plugin.compatibility import check_compatibility, check_pruning
from lightning_peft.plugin.exclusion_advice import exclusion_advice
from lightning_peft.plugin.injection_settings import injection_settings
from lightning_peft.plugin.training_checks import TrainingChecks

if TYPE_CHECKING:
    from torch import nn

    from lightning_peft.arguments import LoRAArguments

log = logging.getLogger(__name__)


class Lifecycle:
    """Injects into one module at the right moment, in every stage, exactly once.

    Attributes:
        injection: What to do.
        print_summary: Whether to print what was adapted when training starts.
        checks: What is checked when training starts.
        facts: What the ``provenance.json`` of every adapter that is saved says besides.
    """

    def __init__(self, arguments: LoRAArguments) -> None:
        self.injection = injection_settings(arguments)
        self.print_summary = arguments.print_summary
        self.checks = TrainingChecks(arguments.verify)
        self.provenance: dict[str, Any] = {}
        self._pending_module: Any = None
        self._original_hook: Any = None
        self._missing: list[str] = []

    def install(self, module: Any, strategy: Any) -> None:
        """Wraps ``configure_model`` of this instance; doing it again in the same stage is fine.

        Raises:
            UnsupportedError: For callbacks and plugins that would undo or corrupt the adapters.
        """
        if self._pending_module is module:
            return
        self.uninstall()
        check_compatibility(module, strategy, self.injection.quantization_config is not None)
        self._original_hook = module.__dict__.get("configure_model")

        # A function, not a callable object: Lightning compares code objects to see an override.
        def configure_model() -> None:
            self.uninstall()
            requested = self.injection
            with engine.loading_for_injection(
                module,
                requested.peft_config,
                requested.quantization_config,
                requested.adapt,
                strategy.root_device,
                requested.cache_quantized_base,
            ) as loading:
                module.configure_model()
            # Again: the module may have brought callbacks of its own since.
            check_compatibility(module, strategy, requested.quantization_config is not None)
            with _default_dtype_and_device():
                self._inject(module, strategy)
            self._store_quantized(module, strategy, loading)

        self._pending_module = module
        module.__dict__["configure_model"] = configure_model

    def uninstall(self) -> None:
        """Gives the module its own ``configure_model`` back."""
        module, self._pending_module = self._pending_module, None
        if module is None:
            return
        module.__dict__.pop("configure_model", None)
        if self._original_hook is not None:
            module.__dict__["configure_model"] = self._original_hook
        self._original_hook = None

    def _inject(self, module: Any, strategy: Any) -> None:
        record = engine.record_of(module)
        self._missing = [] if record is None else _missing_layers(module, record)
        if self._missing:
            engine.set_record(module, None)
        if engine.record_of(module) is None:
            outside = engine.unregistered_copies(module)
            settings = self.injection
            request = engine.InjectionRequest(settings.peft_config, settings.quantization_config)
            device, requested = strategy.root_device, settings.explicitly_set
            engine.inject_config(module, request, settings.adapt, device, requested)
            _check_ranks(module)
            _warn_unregistered_copies(module, outside)
        else:
            self._check_existing_adapters(module)
        if _is_fitting(module):
            check_pruning(module)
            _prepare_training(module)
            if self.print_summary and strategy.is_global_zero:
                self.print_summary = False
                engine.show(engine.report(module))

    def _store_quantized(self, module: Any, strategy: Any, loading: Any) -> None:
        for entry in engine.store_quantized(module, loading):
            if strategy.is_global_zero:
                engine.show(
                    f"The quantized base is kept for the next start: {entry.size / 1e9:.2f} GB in "
                    f"{entry.folder} (lightning-peft cache lists and clears)."
                )

    def _check_existing_adapters(self, module: nn.Module) -> None:
        """Compares adapters that are there already with the ones that were asked for."""
        record = engine.require_record(module)
        requested = engine.config_to_dict(self.injection.peft_config)
        quantization = engine.quantization_to_dict(self.injection.quantization_config)
        aside = engine.recorded_selection(module, record).exclusions
        problems = []
        if self.injection.adapt is not None and set(self.injection.adapt) != set(record.parts):
            problems.append(f"adapt={sorted(record.parts)}, asked for {self.injection.adapt}")
        for name, part in record.parts.items():
            where = name or type(module).__name__
            info = part.adapters[record.active[0]]
            if part.from_peft_wrapper and not self.injection.explicitly_set:
                continue
            problems += [
                f"{where}: {key}={info.config.get(key)!r}, asked for {requested.get(key)!r}"
                for key in (*engine.DECISIVE_FIELDS, "lora_dropout")
                if info.config.get(key) != requested.get(key)
            ]
            if part.quantization != quantization:
                problems.append(
                    f"{where}: quantization is {part.quantization}, asked for {quantization}"
                )
            problems += self._target_differences(module.get_submodule(name), part, info, aside)
        if problems:
            raise LifecycleError(
                "The module has adapters already, with other settings than were asked for:"
                + itemize(problems)
                + "\nAsk for the same settings, or build the module again."
            )

    def _target_differences(self, part: nn.Module, entry: Any, info: Any, aside: Any) -> list[str]:
        if not info.in_place:
            # Inside PEFT's wrappers the layers have other names.
            return []
        requested = engine.resolve_targets({entry.name: part}, self.injection.peft_config, aside)[
            entry.name
        ]
        missing, surplus = (
            sorted({*requested} - {*info.targets}),
            sorted({*info.targets} - {*requested}),
        )
        return [f"{entry.qualified(name)}: no adapter, asked for one" for name in missing] + [
            f"{entry.qualified(name)}: has an adapter, not asked for" for name in surplus
        ]

    def check_restored(self, restored: bool) -> None:
        """Called when the stage is set up: adapters that a rebuild threw away must be back.

        Raises:
            LifecycleError: If the module was built again and no checkpoint was loaded.
        """
        missing, self._missing = self._missing, []
        if missing and not restored:
            raise LifecycleError(
                "The module built its layers again in `setup` or `configure_model`, which threw "
                "the trained adapters away:"
                + itemize(missing, 5)
                + "\nBuild them only once (`if self.model is None:`), or pass `ckpt_path`."
            )

    def check_frozen(self, module: nn.Module) -> None:
        """The base must be as frozen as injection left it: checkpoints do not hold it.

        Raises:
            LifecycleError: If base weights were set to train since, or are not there any more.
        """
        params = dict(module.named_parameters(remove_duplicate=False))
        frozen = sorted(engine.require_record(module).frozen)
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

    def check_optimizers(self, module: nn.Module, optimizers: list[Any]) -> None:
        """Every trainable adapter must be in an optimizer, and no optimizer without anything.

        Raises:
            LifecycleError: If training would leave adapters, or whole optimizers, idle.
        """
        record = engine.require_record(module)
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
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
        for index, optimizer in enumerate(optimizers):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            if not any(param.requires_grad for param in params):
                problems.append(
                    f"optimizer {index} ({type(optimizer).__name__}) holds only frozen parameters"
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


@contextmanager
def _default_dtype_and_device() -> Iterator[None]:
    """Undoes what Lightning sets around ``configure_model`` for the sake of the user's layers.

    Constants of the quantization would be made in half precision, and the same seed would give
    other adapters on another device.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def _missing_layers(module: nn.Module, record: Any) -> list[str]:
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


def _check_ranks(module: nn.Module) -> None:
    """Compares the frozen bases of all ranks: DDP broadcasts packed bytes, not constants."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    record = engine.require_record(module)
    mine = {name: part.base.sums for name, part in record.parts.items()}
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if not others:
        return
    names = [
        part.qualified(tensor)
        for name, part in record.parts.items()
        for tensor, a, b in zip(
            part.base.names, everyone[0][name], everyone[others[0]][name], strict=True
        )
        if a != b
    ]
    raise BaseMismatchError(
        f"Ranks {others} have another base model than rank 0:"
        + itemize(names, 5)
        + "\nQuantized weights cannot be broadcast, so each rank would train against its own. "
        "Load the same checkpoint on every rank, or call seed_everything(...) before a base "
        "with random weights is built."
    )


def _prepare_training(module: nn.Module) -> None:
    """Refuses merged and frozen adapters, and sets the adapted parts to train mode."""
    record = engine.require_record(module)
    engine.unfreeze_unoptimized(module)
    parts = [(entry, module.get_submodule(name)) for name, entry in record.parts.items()]
    merged = [
        entry.qualified(name)
        for entry, part in parts
        for name, layer in engine.adapted_layers(part).items()
        if getattr(layer, "lora_merged", ())
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
    engine.set_training_mode(module)


def _warn_unregistered_copies(module: nn.Module, outside: dict[str, str]) -> None:
    for where, name in outside.items():
        if engine.adapted_layers(module.get_submodule(name)):
            log.warning(
                "%s is a copy of %r that the module does not register. It gets no adapters, and a "
                "loop over the parameters() of both does not line up. Where it is to follow, as a "
                "momentum copy does, make it an attribute of the module.",
                where,
                name,
            )


def _is_fitting(module: Any) -> bool:
    trainer = trainer_of(module)
    return trainer is not None and trainer.state.fn == "fit"

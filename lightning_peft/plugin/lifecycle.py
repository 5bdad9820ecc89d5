"""The order of things, written once.

build (``__init__``, ``setup``, ``configure_model``) -> quantize and inject -> restore -> wrap ->
optimizers -> train. The one place that comes after every way to build and before the restore is
the end of ``configure_model``, so that hook is wrapped on the instance, for one call.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft import engine
from lightning_peft.errors import BaseMismatchError, LifecycleError, UnsupportedError, itemize

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

_BUILT_IN_CALLBACKS = {
    "WeightAveraging": "it averages packed 4-bit codes as if they were numbers, and restores its "
    "full model past the strategy",
    "StochasticWeightAveraging": "its state in the checkpoint is the full model",
    "BaseFinetuning": "it unfreezes base weights, which an adapter checkpoint does not hold",
}
_REFUSED_STRATEGIES = {
    "FSDPStrategy": "it shards parameters, and 4-bit weights and adapters need their own layout",
    "ModelParallelStrategy": "it shards parameters in the module's configure_model",
    "DeepSpeedStrategy": "it restores and saves through its own engine",
    "XLAStrategy": "bitsandbytes has no kernels for it",
    "SingleDeviceXLAStrategy": "bitsandbytes has no kernels for it",
}


@dataclass(frozen=True)
class Injection:
    """What the strategy or callback was asked to do.

    Attributes:
        peft_config: PEFT's config.
        quantization_config: transformers' config, or ``None`` for a base as it is.
        adapt: Names of the submodules to adapt, or ``None``.
    """

    peft_config: Any
    quantization_config: Any
    adapt: list[str] | None


class Lifecycle:
    """Injects into one module at the right moment, in every stage, exactly once.

    Attributes:
        injection: What to do.
        announce: Whether to print what was adapted when training starts.
    """

    def __init__(self, injection: Injection, announce: bool = True) -> None:
        self.injection = injection
        self.announce = announce
        self._waiting: Any = None
        self._own_hook: Any = None
        self._lost: list[str] = []

    def install(self, module: Any, strategy: Any) -> None:
        """Wraps ``configure_model`` of this instance; doing it again in the same stage is fine.

        Raises:
            UnsupportedError: For callbacks and plugins that would undo or corrupt the adapters.
        """
        if self._waiting is not None:
            return
        self._refuse(module, strategy)
        self._own_hook = module.__dict__.get("configure_model")

        # A function, not a callable object: Lightning compares code objects to see an override.
        def configure_model() -> None:
            self.uninstall()
            module.configure_model()
            self._inject(module, strategy)

        self._waiting = module
        module.__dict__["configure_model"] = configure_model

    def uninstall(self) -> None:
        """Gives the module its own ``configure_model`` back."""
        module, self._waiting = self._waiting, None
        if module is None:
            return
        module.__dict__.pop("configure_model", None)
        if self._own_hook is not None:
            module.__dict__["configure_model"] = self._own_hook
        self._own_hook = None

    def _refuse(self, module: Any, strategy: Any) -> None:
        problems = []
        for cls in type(strategy.precision_plugin).__mro__:
            if cls.__name__ == "BitsandbytesPrecision":
                problems.append(
                    "plugins=BitsandbytesPrecision: it would quantize the adapters too and freeze "
                    "everything. Remove it: QLoRAStrategy quantizes the base itself"
                )
        for cls in type(strategy).__mro__:
            if cls.__name__ in _REFUSED_STRATEGIES:
                problems.append(
                    f"{cls.__name__}: {_REFUSED_STRATEGIES[cls.__name__]}. Use LoRAStrategy or "
                    "QLoRAStrategy, on one device or several"
                )
        if getattr(strategy, "_start_method", "popen") != "popen":
            problems.append(
                f"start_method={strategy._start_method!r}: the trained adapters would stay in the "
                "spawned processes and be lost when they end. Use strategy='ddp' from a script"
            )
        for callback in getattr(module._trainer, "callbacks", []):
            for cls in type(callback).__mro__:
                if cls.__name__ in _BUILT_IN_CALLBACKS:
                    problems.append(
                        f"callback {type(callback).__name__}: {_BUILT_IN_CALLBACKS[cls.__name__]}. "
                        "Remove it"
                    )
        if problems:
            raise UnsupportedError(
                "Adapters cannot be trained together with:" + itemize(dict.fromkeys(problems))
            )

    def _inject(self, module: Any, strategy: Any) -> None:
        record = engine.record_of(module)
        if record is not None:
            self._lost = self._vanished(module, record)
            if self._lost:
                engine.set_record(module, None)
        if engine.record_of(module) is None:
            engine.inject(
                module,
                self.injection.peft_config,
                quantization_config=self.injection.quantization_config,
                adapt=self.injection.adapt,
                device=strategy.root_device,
            )
            self._check_ranks(module, strategy)
        else:
            self._check_same(module)
        if _fitting(module):
            self._prepare_training(module, strategy)

    @staticmethod
    def _vanished(module: nn.Module, record: Any) -> list[str]:
        gone = []
        for name, part in record.parts.items():
            try:
                layers = engine.adapted_layers(module.get_submodule(name))
            except AttributeError:
                layers = {}
            targets = {t for info in part.adapters.values() for t in info.targets}
            gone += [part.qualified(t) for t in sorted(targets) if t not in layers]
        return gone

    def _check_same(self, module: nn.Module) -> None:
        record = engine.require_record(module)
        wanted = engine.config_to_dict(self.injection.peft_config)
        quantization = engine.quantization_to_dict(self.injection.quantization_config)
        problems = []
        for name, part in record.parts.items():
            config = part.adapters[record.active[0]].config
            problems += [
                f"{name or type(module).__name__}: {key}={config.get(key)!r} on the module, "
                f"{wanted.get(key)!r} asked for"
                for key in engine.DECISIVE_FIELDS
                if config.get(key) != wanted.get(key)
            ]
            if part.quantization != quantization:
                problems.append(
                    f"{name or type(module).__name__}: quantization {part.quantization} on the "
                    f"module, {quantization} asked for"
                )
        if problems:
            raise LifecycleError(
                "The module has adapters already, with other settings:"
                + itemize(problems)
                + "\nUse the same settings, or build the module anew."
            )

    def _check_ranks(self, module: nn.Module, strategy: Any) -> None:
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

    def _prepare_training(self, module: Any, strategy: Any) -> None:
        record = engine.require_record(module)
        merged = [
            f"{name}.{layer}".lstrip(".")
            for name in record.parts
            for layer, adapted in engine.adapted_layers(module.get_submodule(name)).items()
            if getattr(adapted, "lora_merged", ())
        ]
        if merged:
            raise LifecycleError(
                "These layers have their adapters merged, so nothing would train:"
                + itemize(merged, 5)
                + "\nCall lightning_peft.unmerge(module) first."
            )
        for name in record.parts:
            part = module.get_submodule(name)
            # from_pretrained returns models in eval mode and Lightning keeps it: dropout of the
            # adapters and gradient checkpointing would be off without a word.
            if not part.training:
                part.train()
                log.info("%s was in eval mode; set to train mode", name or type(module).__name__)
        if self.announce and strategy.is_global_zero:
            engine.show(engine.report(module))

    def check_restored(self, restored: bool) -> None:
        """Called when the stage is set up: adapters that a rebuild threw away must be back.

        Raises:
            LifecycleError: If the module was built again and no checkpoint was loaded.
        """
        lost, self._lost = self._lost, []
        if lost and not restored:
            raise LifecycleError(
                "The module built its layers again in `setup` or `configure_model`, which threw "
                "the trained adapters away:"
                + itemize(lost, 5)
                + "\nBuild them only once (`if self.model is None:`), or pass `ckpt_path`."
            )

    def check_optimizers(self, module: nn.Module, optimizers: list[Any]) -> None:
        """Every trainable adapter must be in an optimizer, and no optimizer without anything.

        Raises:
            LifecycleError: If training would leave adapters, or whole optimizers, idle.
        """
        record = engine.require_record(module)
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        problems = []
        for name, part in record.parts.items():
            named = engine.trained_parameters(module.get_submodule(name), part)
            missing = [part.qualified(n) for n, p in named.items() if id(p) not in held]
            if missing:
                problems.append(
                    f"{len(missing)} of {len(named)} trainable tensors of "
                    f"{name or type(module).__name__} are in no optimizer, such as {missing[0]!r}"
                )
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
                "configure_optimizers: lists made in __init__ or by name are older than the "
                "adapters."
            )


def _fitting(module: Any) -> bool:
    trainer = module._trainer
    return trainer is not None and str(getattr(trainer.state.fn, "value", "")) == "fit"

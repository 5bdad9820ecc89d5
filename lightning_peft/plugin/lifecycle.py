"""Order of injection, checks and optimizer setup in a fit.

build (``__init__``, ``setup``, ``configure_model``) -> quantize and inject -> restore -> wrap ->
optimizers -> train. The one place that comes after every way to build and before the restore is
the end of ``configure_model``, so that hook is wrapped on the instance, for one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import summary_depth, trainer_of
from lightning_peft.errors import LifecycleError, itemize
from lightning_peft.plugin.adapter_checks import (
    check_compatibility,
    check_existing_adapters,
    check_pruning,
    check_same_base_on_all_ranks,
    check_trainable,
    missing_layers,
    warn_unregistered_copies,
)
from lightning_peft.plugin.averaging import serve_averages
from lightning_peft.plugin.background_saving import BackgroundSaves
from lightning_peft.plugin.divergence import DivergenceCheck
from lightning_peft.plugin.failure_notice import FailureNotice
from lightning_peft.plugin.injection_settings import injection_settings, with_adapter_defaults
from lightning_peft.plugin.sharding import early_share
from lightning_peft.plugin.training_checks import TrainingChecks
from lightning_peft.plugin.unfreezing import (
    freeze_stages,
    serve_finetuning,
    unfreeze_stages,
)

if TYPE_CHECKING:
    from lightning_peft.arguments import LoRAArguments


class Lifecycle:
    """Injects into one module at the right moment, in every stage, exactly once.

    Attributes:
        injection: What to do.
        announce: Whether to print what was adapted when training starts.
        halve_batch_on_oom: Whether batches become smaller where memory is short.
        saves: Checkpoints that are being written.
        checks: What is checked when training starts.
        failures: What processes know of each other's errors.
        provenance: Further content for the ``provenance.json`` of every saved adapter.
        decided: What ``"auto"`` was decided to be, by the name of the argument. What is there
            before a run is taken instead of a new decision.
    """

    def __init__(self, arguments: LoRAArguments) -> None:
        self.injection = self._requested = injection_settings(arguments)
        self._arguments = arguments
        self.announce = arguments.announce
        self.halve_batch_on_oom = arguments.halve_batch_on_oom
        self.saves = BackgroundSaves(arguments.async_save)
        self.checks = TrainingChecks(arguments.verify)
        self.divergence = DivergenceCheck()
        self.failures = FailureNotice()
        self.provenance: dict[str, Any] = {}
        self.decided: dict[str, Any] = {}
        self._pending_module: Any = None
        self._original_hook: Any = None
        self._missing: list[str] = []

    def install(self, module: Any, strategy: Any) -> None:
        """Wraps ``configure_model`` of this instance; doing it again in the same stage is fine."""
        if self._pending_module is module:
            return
        self.uninstall()
        check_compatibility(module, strategy, self.injection.quantization_config is not None)
        serve_averages(module)
        serve_finetuning(module)
        self._original_hook = module.__dict__.get("configure_model")

        # A function, not a callable object: Lightning compares code objects to see an override.
        def configure_model() -> None:
            self.uninstall()
            requested = with_adapter_defaults(self._requested, self._arguments, module)
            self.injection = requested
            with early_share(strategy, requested.peft_config):
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
                serve_averages(module)
                serve_finetuning(module)
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
        engine.adopt_inner_adapters(module)
        record = engine.record_of(module)
        self._missing = [] if record is None else missing_layers(module, record)
        if self._missing:
            # Of other layers, adapters may be there: a checkpoint has to have all of them.
            engine.set_record(module, engine.Record())
        if self._missing or record is None:
            outside = engine.unregistered_copies(module)
            settings = self.injection
            request = engine.InjectionRequest(settings.peft_config, settings.quantization_config)
            device, requested = strategy.root_device, settings.adapters_configured
            engine.inject_config(module, request, settings.adapt, device, requested)
            check_same_base_on_all_ranks(module, strategy.world_size)
            warn_unregistered_copies(module, outside)
        else:
            check_existing_adapters(module, self.injection)
        if _is_fitting(module):
            engine.note_excluded(module, self._arguments.exclude_from_checkpoint)
            engine.agree_on_excluded(
                module, strategy.world_size, self._arguments.exclude_from_checkpoint
            )
            check_pruning(module)
            engine.unfreeze_unoptimized(module)
            unfreeze_stages(module)
            check_trainable(module)
            freeze_stages(module)
            engine.set_training_mode(module)
            if self.announce and strategy.is_global_zero:
                self.announce = False
                engine.show(engine.report(module))
                if self.injection.quantization_config is not None:
                    _drop_model_summary(module.trainer)

    def _store_quantized(self, module: Any, strategy: Any, loading: Any) -> None:
        for entry in engine.store_quantized(module, loading):
            if strategy.is_global_zero:
                engine.show(
                    f"The quantized base is kept for the next start: {entry.size / 1e9:.2f} GB in "
                    f"{entry.folder} (lightning-peft cache lists and clears)."
                )

    def check_restored(self, restored: bool) -> None:
        """Called when the stage is set up: adapters that a rebuild threw away must be back."""
        missing, self._missing = self._missing, []
        if missing and not restored:
            raise LifecycleError(
                "The module built its layers again in `setup` or `configure_model`, which threw "
                "the trained adapters away:"
                + itemize(missing, 5)
                + "\nBuild them only once (`if self.model is None:`), or pass `ckpt_path`."
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


def _drop_model_summary(trainer: Any) -> None:
    """Takes Lightning's default summary out, which counts packed bytes as parameters.

    The report that was just shown has the right numbers.
    """
    names = ("ModelSummary", "RichModelSummary")
    kept = [c for c in trainer.callbacks if type(c).__name__ not in names or summary_depth(c) != 1]
    trainer.callbacks[:] = kept


def _is_fitting(module: Any) -> bool:
    trainer = trainer_of(module)
    return trainer is not None and trainer.state.fn == "fit"

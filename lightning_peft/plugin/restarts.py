"""ReLoRA callback, after Lialin et al. 2023 (arXiv 2307.05695)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import ends_fit
from lightning_peft.errors import ConfigError, UnsupportedError, itemize
from lightning_peft.plugin.averaging import AVERAGING_CALLBACKS
from lightning_peft.plugin.namespace import LateBoundCallback
from lightning_peft.plugin.optimization import log_info, real_optimizers

log = logging.getLogger(__name__)

# Of an adapter's effect, from which its loss to rounding is worth a warning.
_NOTICEABLE = 0.05


class MergeAndRestart(LateBoundCallback):
    """Merges LoRA adapters into the base while they train, and begins new ones: ReLoRA.

    A quantized weight becomes the nearest codes, and its new adapter starts at what these lose.

    Checkpoints and adapter folders hold the merged weights of the adapted layers from the first
    merge on, and a resumed run continues exactly. ``disable_adapters`` then means the merged base.

    Args:
        every_n_steps: Optimizer steps of one adapter.
        prune_states: The share of the optimizer's states of the adapters that is zeroed at each
            merge, where first moments are least; 1 makes new states, as 8-bit optimizers and those
            that keep more than moments, such as copies of weights, get them whatever the share.
        warmup_steps: Optimizer steps in which the learning rates rise to what they are set to after
            each merge; by default a twentieth of ``every_n_steps``, at most 100. The schedule of
            the module acts as well.

    Raises:
        ConfigError: If a number makes no sense.
        UnsupportedError: At the start of a fit, if the adapters cannot be merged, or if something
            else of the run needs the base as it was.
    """

    def __init__(
        self, every_n_steps: int, prune_states: float = 0.99, warmup_steps: int | None = None
    ) -> None:
        super().__init__()
        if warmup_steps is None:
            warmup_steps = min(every_n_steps // 20, 100)
        problems = []
        if every_n_steps < 1:
            problems.append(f"every_n_steps={every_n_steps!r}: 1 or more")
        if not 0 <= prune_states <= 1:
            problems.append(f"prune_states={prune_states!r}: a share from 0 to 1")
        if not 0 <= warmup_steps < max(every_n_steps, 1):
            problems.append(f"warmup_steps={warmup_steps!r}: from 0 to less than every_n_steps")
        if problems:
            raise ConfigError(
                "MergeAndRestart with these settings cannot work:" + itemize(problems)
            )
        self.every_n_steps, self.prune_states = every_n_steps, prune_states
        self.warmup_steps = warmup_steps
        self._restarts, self._last, self._seed = 0, 0, 0
        self._hooks: list[Any] = []
        # Learning rates of optimizers within their steps.
        self._rates: dict[Any, list[Any]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forgets the fit before."""
        self._restarts, self._last, self._seed = 0, trainer.global_step, 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks for what cannot work."""
        problems = []
        if getattr(trainer.strategy, "lifecycle", None) is None:
            problems.append(
                f"{type(trainer.strategy).__name__} adds no adapters: use LoRAStrategy, or "
                "LoRACallback before this one"
            )
        for callback in trainer.callbacks:
            names = {cls.__name__ for cls in type(callback).__mro__}
            if names & AVERAGING_CALLBACKS:
                problems.append(
                    f"callback {type(callback).__name__}: its average would mix adapters of "
                    "different bases"
                )
        if getattr(pl_module, "has_reference", False):
            problems.append(
                f"{type(pl_module).__name__}: its reference is the base without adapters, which "
                "would be another one after each merge"
            )
        if problems:
            raise UnsupportedError("MergeAndRestart cannot work here:" + itemize(problems))
        engine.check_restartable(pl_module)
        if not self._seed:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % 2**31 + 1)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lets optimizers step with the learning rates of the warm-up."""
        for optimizer in real_optimizers(trainer.strategy) if self.warmup_steps else ():
            if not getattr(type(optimizer).step, "hooked", False):
                raise UnsupportedError(
                    f"MergeAndRestart(warmup_steps={self.warmup_steps}) with "
                    f"{type(optimizer).__name__}, which calls no hooks before its steps. Use "
                    "warmup_steps=0 and a schedule that rises after each merge."
                )

            def lower(optimizer: Any, *_: Any) -> None:
                # The step before may have raised.
                self._restore(optimizer)
                self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * self._share(trainer.global_step)

            self._hooks += [
                optimizer.register_step_pre_hook(lower),
                optimizer.register_step_post_hook(self._restore),
            ]

    def _restore(self, optimizer: Any, *_: Any) -> None:
        """Puts learning rates back, before a schedule computes the next ones from them."""
        rates = self._rates.pop(optimizer, None)
        for group, rate in zip(optimizer.param_groups, rates or (), strict=False):
            group["lr"] = rate

    def _share(self, step: int) -> float:
        """Returns the factor of the learning rates in the optimizer step after ``step``."""
        if not self._restarts:
            return 1.0
        return min(1.0, (step - self._last + 1) / (self.warmup_steps + 1))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merges where it is time, unless training ends with this step."""
        step = trainer.global_step
        if step - self._last < self.every_n_steps or ends_fit(trainer):
            return
        self._restarts, self._last = self._restarts + 1, step
        seed = self._seed + self._restarts
        report = engine.merge_and_restart(pl_module, seed, trainer.world_size)
        engine.prune_states(
            real_optimizers(trainer.strategy),
            engine.all_adapter_parameters(pl_module),
            self.prune_states,
        )
        rounded = [x.requantized_error for x in report.layers if x.requantized_error is not None]
        again = f" New codes alone would lose {max(rounded):.1e}." if rounded else ""
        log_info(
            trainer.strategy,
            f"Step {step}: {len(report.layers)} layers merged, new adapters begin. Of the old "
            f"ones' effect at most {report.worst_error:.1e} is lost to rounding.{again}",
        )
        if report.worst_error > _NOTICEABLE and self._restarts == 1 and trainer.is_global_zero:
            log.warning(
                "Merging lost up to %.0f %% of the effect of an adapter to the rounding of %s",
                100 * report.worst_error,
                "quantized weights. Use a larger r, or merge less often."
                if rounded
                else "16-bit weights. Load the base in float32 and train with "
                "precision='bf16-mixed', or merge less often, when adapters have learnt more.",
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Takes the hooks off the optimizers."""
        self._remove_hooks()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Takes the hooks off the optimizers."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        for optimizer in list(self._rates):
            self._restore(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns how often and when it merged last."""
        return {"restarts": self._restarts, "last": self._last, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` returned."""
        self._restarts, self._last = state_dict["restarts"], state_dict["last"]
        self._seed = state_dict["seed"]

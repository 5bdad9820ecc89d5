"""``LoRACallback`` and ``QLoRACallback``, for use with any strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_peft.arguments import LoRAArguments, QLoRAArguments
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.namespace import LateBoundCallback, mixed_class
from lightning_peft.plugin.sharding import check_sharding

# Subclasses of what is served, and others; by name, since each tree has its own classes.
_REFUSED = {
    "FSDPStrategy": "it shards parameters, and 4-bit weights and adapters need their own layout",
    "ModelParallelStrategy": "it shards parameters in the module's configure_model",
    "DeepSpeedStrategy": "it saves and restores through its own engine",
    "XLAStrategy": "bitsandbytes has no kernels for it",
    "SingleDeviceXLAStrategy": "bitsandbytes has no kernels for it",
}
_SERVED = ("SingleDeviceStrategy", "DDPStrategy")


class _AdapterCallback(LateBoundCallback):
    """Gives the Trainer's own strategy object what :class:`AdapterStrategy` does.

    Callback hooks alone cannot do it: they come too early for modules built in
    ``configure_model``, are skipped by weights-only checkpoints, and run after the restore.
    """

    if TYPE_CHECKING:
        ddp_kwargs: dict[str, Any] | None
        sharding: Literal["fsdp2"] | None

    def __post_init__(self) -> None:
        """Validates the arguments."""
        if self.ddp_kwargs:
            raise ConfigError(
                f"ddp_kwargs={self.ddp_kwargs!r}: a callback makes no strategy. Put them into your "
                "own DDPStrategy."
            )
        check_sharding(self)
        if self.sharding:
            raise ConfigError(
                f"sharding={self.sharding!r}: only a strategy can spread the base over processes. "
                "Use LoRAStrategy or QLoRAStrategy in place of the callback."
            )
        self.lifecycle = Lifecycle(self)  # type: ignore[arg-type]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Extends the strategy, just before ``configure_model``."""
        strategy = trainer.strategy
        if not isinstance(strategy, AdapterStrategy):
            _check_served(strategy, type(self).__name__)
            strategy.__class__ = mixed_class(AdapterStrategy, type(strategy))
            strategy.lifecycle = self.lifecycle
            # The environment is there already.
            self.lifecycle.failures.start(strategy.global_rank, strategy.world_size)
        if strategy.lifecycle is not self.lifecycle:
            raise UnsupportedError(
                f"{type(self).__name__} with {type(strategy).__name__}, or with another "
                "callback of its kind, would add adapters twice. Keep one of the two."
            )
        self.lifecycle.install(pl_module, strategy)


def _check_served(strategy: Any, callback: str) -> None:
    names = [cls.__name__ for cls in type(strategy).__mro__]
    reason = next((_REFUSED[name] for name in names if name in _REFUSED), None)
    if reason is None and not set(names) & set(_SERVED):
        reason = "it is not one of Lightning's own for one device or DDP"
    if reason is not None:
        raise UnsupportedError(
            f"{callback} cannot serve {names[0]}: {reason}. It works with strategy='auto' and "
            "'ddp'; or use LoRAStrategy or QLoRAStrategy."
        )


class LoRACallback(LoRAArguments, _AdapterCallback):
    """Trains LoRA adapters with the strategy that the Trainer has.

    ``Trainer(strategy="ddp", callbacks=[LoRACallback(r=16)])``: the same engine, the same
    checkpoints and the same arguments as :class:`LoRAStrategy`.
    """


class QLoRACallback(QLoRAArguments, _AdapterCallback):
    """Trains LoRA adapters on a 4-bit base with the strategy that the Trainer has.

    ``Trainer(strategy="ddp", callbacks=[QLoRACallback(r=16)])``: the same engine, the same
    checkpoints and the same arguments as :class:`QLoRAStrategy`.
    """

"""``LoRACallback`` and ``QLoRACallback``: adapters beside a strategy that the user keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.arguments import LoRAArguments, QLoRAArguments, given, injection_from
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object

_SERVED = ("SingleDeviceStrategy", "DDPStrategy")
_CLASSES: dict[type, type] = {}


class _AdapterCallback(_Base, metaclass=PerNamespace):
    """Gives the Trainer's own strategy object what :class:`AdapterStrategy` does.

    Callback hooks alone cannot do it: they come too early for modules built in
    ``configure_model``, are skipped by weights-only checkpoints, and run after the restore.
    """

    lightning_base = "callbacks.Callback"

    def _take(self, arguments: dict[str, Any]) -> None:
        self._made_with = given(arguments)
        if self._made_with["ddp_kwargs"]:
            raise ConfigError(
                f"ddp_kwargs={self._made_with['ddp_kwargs']!r}: a callback makes no strategy. Put "
                "them into your own DDPStrategy."
            )
        self.lifecycle = Lifecycle(injection_from(self._made_with), self._made_with["announce"])

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Extends the strategy, just before ``configure_model``.

        Raises:
            UnsupportedError: If the strategy cannot be served, or adds adapters itself.
        """
        strategy = trainer.strategy
        current = getattr(strategy, "lifecycle", None)
        if current is not None and current is not self.lifecycle:
            raise UnsupportedError(
                f"{type(self).__name__} beside {type(strategy).__name__} would add adapters twice. "
                "Keep one of the two."
            )
        if current is None:
            if not any(cls.__name__ in _SERVED for cls in type(strategy).__mro__):
                raise UnsupportedError(
                    f"{type(self).__name__} cannot serve {type(strategy).__name__} yet. It works "
                    "with strategy='auto' and 'ddp'; or use LoRAStrategy or QLoRAStrategy."
                )
            cls = type(strategy)
            if cls not in _CLASSES:
                _CLASSES[cls] = type(f"Adapter{cls.__name__}", (AdapterStrategy, cls), {})
            strategy.__class__ = _CLASSES[cls]
            strategy.lifecycle = self.lifecycle
        self.lifecycle.install(pl_module, strategy)


class LoRACallback(LoRAArguments, _AdapterCallback):
    """Trains LoRA adapters with the strategy that the Trainer has.

    ``Trainer(strategy="ddp", callbacks=[LoRACallback(r=16)])``: the same engine and the same
    checkpoints as :class:`LoRAStrategy`.
    """

    __doc__ = f"{__doc__}\n{(LoRAArguments.__doc__ or '').partition(chr(10))[2]}"


class QLoRACallback(QLoRAArguments, _AdapterCallback):
    """Trains LoRA adapters on a 4-bit base with the strategy that the Trainer has.

    ``Trainer(strategy="ddp", callbacks=[QLoRACallback(r=16)])``: the same engine and the same
    checkpoints as :class:`QLoRAStrategy`.
    """

    __doc__ = f"{__doc__}\n{(QLoRAArguments.__doc__ or '').partition(chr(10))[2]}"

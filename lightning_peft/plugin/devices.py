"""One strategy for one device and for several: DDP without its ceremony where it is alone."""

from __future__ import annotations

import sys
from abc import ABC
from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.namespace import PerNamespace

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    # As AdapterStrategy does: else this class would come after Lightning's own.
    _Base = ABC


class OneOrMany(_Base, metaclass=PerNamespace):
    """DDP on several devices; on one device no process group, no wrapper, no launcher.

    Lightning gives a strategy object the Trainer's devices only if it is a parallel one. Derived
    from the single-device strategy it would train on the CPU, whatever the Trainer was told.
    """

    lightning_base = "strategies.DDPStrategy"

    @property
    def on_one_device(self) -> bool:
        """Whether this process is the only one."""
        return self.num_nodes * self.num_processes <= 1

    def _configure_launcher(self) -> None:
        if self.on_one_device:
            self._launcher = None
            # Lightning's tuner asks the Trainer before it connects anything to the strategy.
            caller = sys._getframe(1).f_locals.get("self")
            if getattr(caller, "strategy", None) is self:
                _be_alone(caller)
        else:
            super()._configure_launcher()

    def connect(self, model: Any) -> None:
        """Connects the module; on one device the user's sampler stays as it is."""
        if self.on_one_device and model._trainer is not None:
            connector = model._trainer._accelerator_connector
            connector.use_distributed_sampler = False
            # Once more: the strategy may not have been in place when the launcher was chosen.
            _be_alone(connector)
        super().connect(model)

    def setup_distributed(self) -> None:
        """Joins the other processes, if there are any."""
        if self.on_one_device:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def setup(self, trainer: Any) -> None:
        """Moves and wraps the module and makes the optimizers."""
        if self.on_one_device:
            # Past DDPStrategy, which synchronises with processes that are not there.
            super(type(self).lightning_class, self).setup(trainer)
        else:
            super().setup(trainer)

    def _setup_model(self, model: Any) -> Any:
        return model if self.on_one_device else super()._setup_model(model)


class _Alone:
    """Extension of a Trainer's accelerator connector, which asks for the strategy's class only.

    Lightning's batch size finder refuses to run under what it takes for several processes.
    """

    is_distributed = False


_EXTENDED: dict[type, type] = {}


def _be_alone(connector: Any) -> None:
    cls = type(connector)
    if not issubclass(cls, _Alone):
        if cls not in _EXTENDED:
            _EXTENDED[cls] = type(f"Alone{cls.__name__}", (_Alone, cls), {})
        connector.__class__ = _EXTENDED[cls]

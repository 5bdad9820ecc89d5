"""One strategy for one device and for several: DDP without its ceremony where it is alone."""

from __future__ import annotations

import sys
from abc import ABC
from typing import TYPE_CHECKING, Any

from lightning_peft.errors import itemize
from lightning_peft.plugin.mixed_class import mixed_class
from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    # As AdapterStrategy does: else this class would come after Lightning's own.
    _Base = ABC


# What torch says at the second step.
_UNUSED_PARAMETERS = "Expected to have finished reduction in the prior iteration"


def _describe_unused_parameters(module: Any) -> str:
    unreached = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    return (
        "In the step before, the loss did not reach all parameters that train, and DDP waits for "
        "the gradients of each:"
        + itemize(unreached or ["those of the step before are not known any more"], 5)
        + "\nWhere that is right, give the strategy ddp_kwargs={'find_unused_parameters': True}. "
        "Layers that no step uses are left out of the adapters by `exclude_modules`."
    )


class SingleOrDDPStrategy(_Base, metaclass=LateBoundMeta):
    """DDP on several devices; on one device no process group, no wrapper, no launcher.

    Lightning gives a strategy object the Trainer's devices only if it is a parallel one. Derived
    from the single-device strategy it would train on the CPU, whatever the Trainer was told.
    """

    lightning_base = "strategies.DDPStrategy"

    @property
    def is_single_process(self) -> bool:
        """Whether this process is the only one."""
        return self.num_nodes * self.num_processes <= 1

    # A process on one device has no ranks to ask for: a job scheduler may have set only part of the
    # variables that they are read from, or those of another job.
    @property
    def global_rank(self) -> int:
        """Rank among all processes; 0 on one device."""
        return 0 if self.is_single_process else super().global_rank

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this node; 0 on one device."""
        return 0 if self.is_single_process else super().local_rank

    @property
    def node_rank(self) -> int:
        """Rank of this node; 0 on one device."""
        return 0 if self.is_single_process else super().node_rank

    @property
    def world_size(self) -> int:
        """Number of processes; 1 on one device."""
        return 1 if self.is_single_process else super().world_size

    def set_world_ranks(self) -> None:
        """Gives the ranks to whoever asks the environment for them; not on one device."""
        if not self.is_single_process:
            super().set_world_ranks()

    def _configure_launcher(self) -> None:
        if self.is_single_process:
            self._launcher = None
            # Lightning's tuner asks the Trainer before it connects anything to the strategy.
            caller = sys._getframe(1).f_locals.get("self")
            if getattr(caller, "strategy", None) is self:
                _mark_single_process(caller)
        else:
            super()._configure_launcher()

    def connect(self, model: Any) -> None:
        """Connects the module; on one device the user's sampler stays as it is."""
        if self.is_single_process and model._trainer is not None:
            connector = model._trainer._accelerator_connector
            connector.use_distributed_sampler = False
            # Once more: the strategy may not have been in place when the launcher was chosen.
            _mark_single_process(connector)
        super().connect(model)

    def setup_distributed(self) -> None:
        """Joins the other processes, if there are any."""
        if not self.is_single_process:
            super().setup_distributed()

    def setup(self, trainer: Any) -> None:
        """Moves and wraps the module and makes the optimizers."""
        if self.is_single_process:
            # Past DDPStrategy, which synchronises with processes that are not there.
            super(type(self).lightning_class, self).setup(trainer)
        else:
            super().setup(trainer)

    def _setup_model(self, model: Any) -> Any:
        return model if self.is_single_process else super()._setup_model(model)

    def on_exception(self, exception: BaseException) -> None:
        """Explains an error of DDP before Lightning does, whose advice is another strategy."""
        if any(isinstance(arg, str) and _UNUSED_PARAMETERS in arg for arg in exception.args):
            exception.args = (_describe_unused_parameters(self.lightning_module),)
        super().on_exception(exception)


class _SingleProcessConnector:
    """Extension of a Trainer's accelerator connector, which asks for the strategy's class only.

    Lightning's batch size finder refuses to run under what it takes for several processes.
    """

    is_distributed = False


def _mark_single_process(connector: Any) -> None:
    if not isinstance(connector, _SingleProcessConnector):
        connector.__class__ = mixed_class(_SingleProcessConnector, type(connector))

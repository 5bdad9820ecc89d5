"""``LoRAStrategy`` and ``QLoRAStrategy``, on one device or with DDP."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from lightning_peft.arguments import LoRAArguments, QLoRAArguments
from lightning_peft.compat.lightning import checkpoint_io_of
from lightning_peft.errors import ConfigError, itemize
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.namespace import LateBoundMeta, bind_to_lightning, namespace_of
from lightning_peft.plugin.sharding import ShardedBaseStrategy, check_sharding

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    # As FailureNoticeStrategy does: else this class would come after Lightning's own.
    _Base = ABC

_SINGLE_DEVICE = "strategies.SingleDeviceStrategy"
# torch's message at the second step.
_UNUSED_PARAMETERS = "Expected to have finished reduction in the prior iteration"


class SingleOrDDPStrategy(_Base, metaclass=LateBoundMeta):
    """DDP on several devices; on one device no process group, no wrapper, no launcher.

    Lightning gives a strategy object the Trainer's devices only if it is a parallel one: derived
    from the single-device strategy, it would train on the CPU whatever the Trainer's accelerator.
    So it is a DDP strategy until the Trainer has counted its devices.
    """

    lightning_base = "strategies.DDPStrategy"
    rebinds = True
    if TYPE_CHECKING:
        ddp_kwargs: dict[str, Any] | None

    @property
    def accelerator(self) -> Any:
        """The Trainer's accelerator."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        # The first attribute that a Trainer sets: here it is known which Lightning it is of.
        root = namespace_of(accelerator) or type(self).lightning_root
        if root != type(self).lightning_root or type(self).lightning_base == _SINGLE_DEVICE:
            self._rebind(root)
        self._accelerator = accelerator

    def _rebind(self, root: str | None) -> None:
        self.__class__ = bind_to_lightning(type(self).unbound_class, root)
        super().__init__(**self.ddp_kwargs or {})

    def set_world_ranks(self) -> None:
        """Called by the Trainer once devices and nodes are known."""
        if type(self).lightning_base == _SINGLE_DEVICE:
            return
        if self.num_nodes * self.num_processes > 1:
            super().set_world_ranks()
            return
        # Not the root device, which requests a rank: a job scheduler may have set only some of the
        # variables for it, or those of another job.
        (device,) = self.parallel_devices or []
        plugins = checkpoint_io_of(self), self.precision_plugin
        cls: Any = type(self)
        self.__class__ = bind_to_lightning(cls.unbound_class, cls.lightning_root, _SINGLE_DEVICE)
        super().__init__(device, self._accelerator, *plugins)  # type: ignore[arg-type]

    def on_exception(self, exception: BaseException) -> None:
        """Explains an error of DDP before Lightning does, whose advice is another strategy."""
        if any(isinstance(arg, str) and _UNUSED_PARAMETERS in arg for arg in exception.args):
            exception.args = (_describe_unused_parameters(self.lightning_module),)
        super().on_exception(exception)


def _describe_unused_parameters(module: Any) -> str:
    unreached = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    return (
        "In the step before, the loss did not reach all trainable parameters, and DDP waits for "
        "the gradients of each:"
        + itemize(unreached or ["those of the step before are not known any more"], 5)
        + "\nWhere that is right, give the strategy ddp_kwargs={'find_unused_parameters': True}. "
        "Layers that no step uses are left out of the adapters by `exclude_modules`."
    )


class _ArgumentsStrategy(ShardedBaseStrategy, AdapterStrategy, SingleOrDDPStrategy):
    """A strategy whose constructor and attributes are those of :class:`LoRAArguments`."""

    def __post_init__(self) -> None:
        """Validates the arguments."""
        check_sharding(self)
        self.lifecycle = Lifecycle(self)  # type: ignore[arg-type]
        ddp_kwargs = self.ddp_kwargs or {}
        if ddp_kwargs.get("start_method", "popen") != "popen":
            raise ConfigError(
                f"ddp_kwargs={ddp_kwargs!r}: adapters trained in processes that are spawned or "
                "forked would be lost with them. Leave `start_method` out, and run a script."
            )
        super().__init__(**ddp_kwargs)


class LoRAStrategy(LoRAArguments, _ArgumentsStrategy):
    """Trains adapters on a frozen base (LoRA, arXiv 2106.09685); the module stays as it is.

    ``Trainer(strategy=LoRAStrategy())`` or, once ``lightning_peft`` is imported,
    ``Trainer(strategy="lora")``. One device or several (DDP); for ``lightning`` and for
    ``pytorch_lightning``. Takes the arguments of
    :class:`~lightning_peft.arguments.LoRAArguments`.
    """


class QLoRAStrategy(QLoRAArguments, _ArgumentsStrategy):
    """Trains adapters on a 4-bit base (QLoRA, arXiv 2305.14314).

    The frozen linear layers of the adapted parts are stored as NF4 with double quantization, 4.127
    bits per weight; everything else is as in :class:`LoRAStrategy`. Runs on CPU as well, for tests
    and small models. Takes the arguments of
    :class:`~lightning_peft.arguments.QLoRAArguments`.
    """

"""``LoRAStrategy`` and ``QLoRAStrategy``: one argument of the Trainer, one device or several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.arguments import LoRAArguments, QLoRAArguments, given, injection_from
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.namespace import PerNamespace, realize, root_of

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    _Base = object


class _OneOrMany(AdapterStrategy, _Base, metaclass=PerNamespace):
    """DDP on several devices; on one device no process group, no wrapper, no launcher."""

    lightning_base = "strategies.DDPStrategy"

    def _take(self, arguments: dict[str, Any]) -> None:
        self._made_with = given(arguments)
        self.lifecycle = Lifecycle(injection_from(self._made_with), self._made_with["announce"])
        # Past the constructor of the arguments, which called this.
        type(self).lightning_class.__init__(self, **(self._made_with["ddp_kwargs"] or {}))

    @property
    def accelerator(self) -> Any:
        """The Trainer's accelerator."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        # The first thing a Trainer sets, and so the moment to learn which tree it is of.
        root = root_of(accelerator)
        if root is not None and root != type(self).lightning_root:
            self.__class__ = realize(type(self).written_class, root)
            self.__init__(**self._made_with)  # type: ignore[misc]
        self._accelerator = accelerator

    @property
    def on_one_device(self) -> bool:
        """Whether this process is the only one."""
        return self.num_nodes * self.num_processes <= 1

    def _configure_launcher(self) -> None:
        if self.on_one_device:
            self._launcher = None
        else:
            super()._configure_launcher()

    def connect(self, model: Any) -> None:
        """Connects the module; on one device the user's sampler stays as it is."""
        if self.on_one_device and model._trainer is not None:
            model._trainer._accelerator_connector.use_distributed_sampler = False
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
            self.lifecycle.check_restored(self._restored)
            # Past DDPStrategy, which synchronises with processes that are not there.
            super(type(self).lightning_class, self).setup(trainer)
        else:
            super().setup(trainer)

    def _setup_model(self, model: Any) -> Any:
        return model if self.on_one_device else super()._setup_model(model)


class LoRAStrategy(LoRAArguments, _OneOrMany):
    """Trains adapters on a frozen base (LoRA, arXiv 2106.09685); the module stays as it is.

    ``Trainer(strategy=LoRAStrategy())`` or, once ``lightning_peft`` is imported,
    ``Trainer(strategy="lora")``. One device or several (DDP); for ``lightning`` and for
    ``pytorch_lightning``.
    """

    __doc__ = f"{__doc__}\n{(LoRAArguments.__doc__ or '').partition(chr(10))[2]}"


class QLoRAStrategy(QLoRAArguments, _OneOrMany):
    """Trains adapters on a base kept in 4 bits (QLoRA, arXiv 2305.14314).

    The frozen linear layers of the adapted parts are stored as NF4 with double quantization, 4.127
    bits per weight; everything else is as in :class:`LoRAStrategy`. Runs on CPU as well, for tests
    and small models.
    """

    __doc__ = f"{__doc__}\n{(QLoRAArguments.__doc__ or '').partition(chr(10))[2]}"

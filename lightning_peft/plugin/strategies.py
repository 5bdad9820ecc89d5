"""``LoRAStrategy`` and ``QLoRAStrategy``: one argument of the Trainer, one device or several."""

from __future__ import annotations

from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.arguments import LoRAArguments, QLoRAArguments, given, injection_from
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.namespace import bind_to_lightning, namespace_of
from lightning_peft.plugin.single_or_ddp import SingleOrDDPStrategy
from lightning_peft.plugin.training_checks import TrainingChecks


class _Strategy(AdapterStrategy, SingleOrDDPStrategy):
    """What both strategies are; the signature comes from their arguments."""

    def _take(self, arguments: dict[str, Any]) -> None:
        self._made_with = given(arguments)
        self.lifecycle = Lifecycle(
            injection_from(self._made_with), self._made_with["print_summary"]
        )
        self.lifecycle.checks = TrainingChecks(self._made_with["verify"])
        ddp_kwargs = self._made_with["ddp_kwargs"] or {}
        if ddp_kwargs.get("start_method", "popen") != "popen":
            raise ConfigError(
                f"ddp_kwargs={ddp_kwargs!r}: adapters trained in processes that are spawned or "
                "forked would be lost with them. Leave `start_method` out, and run a script."
            )
        # Past the constructor of the arguments, which called this.
        type(self).lightning_class.__init__(self, **ddp_kwargs)

    @property
    def accelerator(self) -> Any:
        """The Trainer's accelerator."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        # The first thing a Trainer sets, and so the moment to learn which tree it is of.
        root = namespace_of(accelerator)
        if root is not None and root != type(self).lightning_root:
            self.__class__ = bind_to_lightning(type(self).unbound_class, root)
            self.__init__(**self._made_with)  # type: ignore[misc]
        self._accelerator = accelerator


class LoRAStrategy(LoRAArguments, _Strategy):
    """Trains adapters on a frozen base (LoRA, arXiv 2106.09685); the module stays as it is.

    ``Trainer(strategy=LoRAStrategy())`` or, once ``lightning_peft`` is imported,
    ``Trainer(strategy="lora")``. One device or several (DDP); for ``lightning`` and for
    ``pytorch_lightning``.
    """

    __doc__ = f"{__doc__}\n{(LoRAArguments.__doc__ or '').partition(chr(10))[2]}"


class QLoRAStrategy(QLoRAArguments, _Strategy):
    """Trains adapters on a base kept in 4 bits (QLoRA, arXiv 2305.14314).

    The frozen linear layers of the adapted parts are stored as NF4 with double quantization, 4.127
    bits per weight; everything else is as in :class:`LoRAStrategy`. Runs on CPU as well, for tests
    and small models.
    """

    __doc__ = f"{__doc__}\n{(QLoRAArguments.__doc__ or '').partition(chr(10))[2]}"

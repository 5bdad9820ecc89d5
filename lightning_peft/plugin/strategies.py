"""``LoRAStrategy`` and ``QLoRAStrategy``."""

from __future__ import annotations

from lightning_peft.arguments import LoRAArguments, QLoRAArguments
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.adapter_strategy import AdapterStrategy
from lightning_peft.plugin.lifecycle import Lifecycle
from lightning_peft.plugin.sharding import ShardedBaseStrategy, check_sharding
from lightning_peft.plugin.single_or_ddp import SingleOrDDPStrategy


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

"""Which submodules are in train mode while adapters train."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_peft.engine.record import require_record
from lightning_peft.engine.selection.scope import left_modules


def set_training_mode(module: nn.Module) -> None:
    """Sets the adapted parts of ``module`` to train mode; everything else keeps its mode.

    ``from_pretrained`` returns models in eval mode and Lightning keeps it: dropout of the adapters
    and gradient checkpointing would be off. Batch norms in eval mode stay so: their statistics
    belong to the base, and no adapter file holds them. So do copies that follow what trains, and
    what is left as it is.

    Raises:
        LifecycleError: If the module has no adapters.
    """
    record = require_record(module)
    apart = set(left_modules(module, record.left or {}))
    for twin in record.twins:
        apart |= set(module.get_submodule(twin.follower).modules())
    for name in record.parts:
        part = module.get_submodule(name)
        modes = {child: child.training for child in part.modules()}
        part.train()
        for child, mode in modes.items():
            if child in apart or (isinstance(child, _BatchNorm) and not mode):
                child.training = mode

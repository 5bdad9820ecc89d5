"""Private access to ``torch.distributed``; see :mod:`lightning_peft.compat.torch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn


def leave_out_of_ddp(module: nn.Module, names: list[str]) -> None:
    """Makes DDP, and Lightning's own broadcast, leave parameters of ``module`` alone.

    Public alternative: none; torch documents the attribute for this.
    """
    chosen: Any = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    module._ddp_params_and_buffers_to_ignore = [*dict.fromkeys([*chosen, *names])]  # type: ignore[assignment]


def exchanges_of(group: Any) -> int:
    """Returns how many collective operations of a process group this process began.

    Public alternative: none.
    """
    return int(group._get_sequence_number_for_group())


def group_store(prefix: str) -> Any:
    """Returns the store of the default process group, if there is one, for keys below ``prefix``.

    Public alternative: none; a ``TCPStore`` of its own needs another port.
    """
    c10d = import_module("torch.distributed.distributed_c10d")
    if not c10d.is_initialized():
        return None
    return c10d.PrefixStore(prefix, c10d._get_default_store())


def broadcast_buffers(ddp: Any) -> None:
    """Gives the buffers of the first process to all, where DDP does before a forward pass.

    Public alternative: none outside of its forward pass.
    """
    if ddp.broadcast_buffers and ddp.modules_buffers:
        ddp._sync_buffers()


@contextmanager
def left_in_place(module: nn.Module, stays: Callable[[Tensor], bool]) -> Iterator[None]:
    """Within the body, tensors for which ``stays`` is true do not move when ``module`` does.

    FSDP stores again what its modules have afterwards, so nothing else can be there meanwhile.
    Public alternative: none.
    """
    usual = module._apply

    def apply(function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return usual(lambda tensor: tensor if stays(tensor) else function(tensor), recurse)

    # It calls that of all modules inside.
    module.__dict__["_apply"] = apply
    try:
        yield
    finally:
        del module.__dict__["_apply"]


def filled(outline: Any, part: Tensor) -> nn.Parameter:
    """Returns a frozen DTensor of the layout of ``outline``, with ``part`` as that of this process.

    Public alternative: ``DTensor.from_local``, which moves the part to the device of the mesh.
    """
    whole = type(outline.data)(part, outline._spec, requires_grad=False)
    return nn.Parameter(whole, requires_grad=False)


def is_fsdp_asking(frame: Any) -> bool:
    """Returns whether a property is read where FSDP looks for its own parameter on a layer.

    Public alternative: none.
    """
    own = import_module("torch.distributed.fsdp._fully_shard._fsdp_param").FSDPParam
    code = own.reset_sharded_param.__code__
    # Properties call those of the classes below them.
    frames = [frame, frame.f_back, frame.f_back and frame.f_back.f_back]
    return any(one is not None and one.f_code is code for one in frames)

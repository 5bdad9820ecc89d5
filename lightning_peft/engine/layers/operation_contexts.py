"""Contexts for autograd functions that compute what is one operation for the code around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_peft.compat.torch import current_dispatch_mode, pause_dispatch_mode


@contextmanager
def paused_recording() -> Iterator[None]:
    """Within the body, operations are not noted in order to be repeated: their result is kept."""
    if not getattr(current_dispatch_mode(), "records_ops", False):
        yield
        return
    with pause_dispatch_mode():
        yield


@contextmanager
def without_autocast(x: Tensor) -> Iterator[None]:
    """Within the body, products are computed in the dtypes that are given."""
    if not torch.is_autocast_enabled(x.device.type):
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield

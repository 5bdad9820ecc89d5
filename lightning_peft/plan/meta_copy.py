"""Meta copies of models, from a config or a module.

First on torch's meta device, where the engine injects as it does into a real module; then as fake
tensors, which take a device's code paths (autocast, attention kernels) without its memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from lightning_peft import engine
from lightning_peft.compat.lightning import owners_of, set_device_of
from lightning_peft.compat.torch import FakeTensor, FakeTensorMode

# Fake tensors of other devices need a torch that was built for them.
_DEVICE = torch.device("cpu")
# Bytes from which a tensor that is neither a parameter nor a buffer loses its values too. Smaller
# ones keep them, since a step may read them: weights of classes, sizes.
_LARGE = 1_000_000


def meta_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of ``module`` whose parameters and buffers are on the meta device.

    So are large tensors that it holds otherwise, such as those of a teacher in a plain list. The
    values are not copied, and neither are datasets that a module holds and the Trainer that it
    belongs to.
    """
    with engine.loaded_formats(module, keep=False):
        return _copy(module)


def _copy(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for param in module.parameters():
        memo[id(param)] = engine.recreate_parameter(param, _on_meta)
    for buffer in module.buffers():
        memo[id(buffer)] = _on_meta(buffer)
    for child in module.modules():
        memo |= {id(owner): None for owner in owners_of(child)}
        # No step changes them, and they may be large.
        data = (one for one in vars(child).values() if isinstance(one, (Dataset, DataLoader)))
        memo |= {id(one): one for one in data}
    with _WithoutLargeValues():
        return copy.deepcopy(module, memo)


class _WithoutLargeValues(TorchFunctionMode):
    """Within the body, copies of large tensors are on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            tensor = args[0]
            if tensor.layout == torch.strided and tensor.nbytes >= _LARGE:
                return _on_meta(tensor).requires_grad_(tensor.requires_grad)
        return func(*args, **(kwargs or {}))


def _on_meta(tensor: Tensor) -> Tensor:
    # Not through methods of the tensor: those of 4-bit weights quantize.
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def make_fake(module: nn.Module, mode: FakeTensorMode, device: torch.device = _DEVICE) -> None:
    """Turns every parameter and buffer of a module on the meta device into a fake one, in place.

    Ties stay ties. Tensors on the meta device that it holds otherwise become fake ones too.
    """
    copies: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in copies:
            copies[id(tensor)] = engine.recreate_parameter(
                tensor, lambda one: FakeTensor(mode, _on_meta(one), device)
            )
        return copies[id(tensor)]

    for child in module.modules():
        set_device_of(child, device)
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = fake(tensor)
    for holder in _holders(module):
        for key, one in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(one, Tensor) and one.is_meta and not isinstance(one, FakeTensor):
                holder[key] = fake(one)


def _holders(module: nn.Module) -> Iterator[Any]:
    """Yields all dicts and lists that ``module`` holds, also through others and unregistered."""
    seen: set[int] = set()
    waiting: list[Any] = [vars(module)]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (dict, list)):
            yield one
        inner = one.values() if isinstance(one, dict) else one
        for value in inner:
            if isinstance(value, nn.Module):
                waiting.append(vars(value))
            elif isinstance(value, (dict, list, tuple)):
                waiting.append(value)


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Within the body, new tensors have no values; those that are real come in as fake ones."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode

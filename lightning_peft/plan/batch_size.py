"""Batch sizes, and batches on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.compat.torch import tree_flatten, tree_unflatten

# Entries of a dict that have no elements of their own where another one has their shape.
_OF_OTHERS = ("mask", "label", "type_ids", "position")


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """What of a batch the memory of a step grows with."""

    # Elements of tensors of integers, such as tokens, and of others, such as pixels.
    integers: int = 0
    floats: int = 0
    # Of strings, which a step may tokenize.
    characters: int = 0
    # Of the dimensions of tensors, and of strings.
    longest: int = 0
    # What cannot be looked into, or why nothing is known.
    unknown: str = ""

    @property
    def elements(self) -> int:
        """All elements, a character being one."""
        return self.integers + self.floats + self.characters

    def bounds(self, factor: float) -> dict[str, int]:
        """Returns the sizes times ``factor``, by name."""
        return {name: int(size * factor) for name, size in self._sizes().items()}

    def is_within(self, bounds: Mapping[str, int]) -> bool:
        """Whether no size exceeds its bound."""
        return all(size <= bounds.get(name, 0) for name, size in self._sizes().items())

    def _sizes(self) -> dict[str, int]:
        sizes = dataclasses.asdict(self)
        del sizes["unknown"]
        return sizes


def size_of(module: Any, batch: Any) -> BatchSize:
    """Returns the size of what a step of ``module`` trains on.

    That is ``module.activation_shapes(batch)`` where there is such a method: a batch of the shapes
    that pass through the model, with gradients, where they are others than those of ``batch``.
    """
    shapes = getattr(module, "activation_shapes", None)
    try:
        return _measured(batch if shapes is None else shapes(batch))
    except Exception as error:
        # The user's own code. Not raised: other processes may wait for the decision of this one.
        return BatchSize(unknown=f"activation_shapes of {type(module).__name__} failed: {error!r}")


def _measured(batch: Any) -> BatchSize:
    size = _size(batch)
    if size.unknown:
        return dataclasses.replace(size, unknown=f"the batch holds a {size.unknown}")
    if not size.integers + size.floats:
        return dataclasses.replace(size, unknown="the batch has no tensors")
    return size


def _size(one: Any) -> BatchSize:
    if isinstance(one, Tensor):
        floats = one.is_floating_point() or one.is_complex()
        elements, longest = one.numel() if one.ndim else 0, max(one.shape, default=0)
        return BatchSize(0 if floats else elements, elements if floats else 0, longest=longest)
    if isinstance(one, (str, bytes)):
        return BatchSize(characters=len(one), longest=len(one))
    if one is None or isinstance(one, numbers.Number):
        return BatchSize()
    entries = _entries(one)
    if entries is None:
        return BatchSize(unknown=type(one).__name__)
    return _sum(map(_size, entries.values() if isinstance(entries, dict) else entries), entries)


def _sum(sizes: Iterable[BatchSize], entries: Any) -> BatchSize:
    found = list(sizes)
    counted = [one for one, own in zip(found, _own(entries), strict=True) if own]
    return BatchSize(
        sum(one.integers for one in counted),
        sum(one.floats for one in counted),
        sum(one.characters for one in counted),
        max((one.longest for one in found), default=0),
        next((one.unknown for one in found if one.unknown), ""),
    )


def _own(entries: Any) -> Iterator[bool]:
    """Yields of each entry whether its elements are not those of another one."""
    if not isinstance(entries, dict):
        yield from (True for _ in entries)
        return

    def of_others(name: Any) -> bool:
        return isinstance(name, str) and any(word in name for word in _OF_OTHERS)

    shapes = {getattr(one, "shape", None) for name, one in entries.items() if not of_others(name)}
    for name, one in entries.items():
        yield not (of_others(name) and isinstance(one, Tensor) and one.shape in shapes)


def _entries(one: Any) -> dict[Any, Any] | list[Any] | None:
    """Returns the entries of a container, by name where they have names; ``None`` of others."""
    if isinstance(one, Mapping):
        return dict(one)
    if isinstance(one, (list, tuple)):
        return list(one)
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    leaves, _ = tree_flatten(one)
    return None if len(leaves) == 1 and leaves[0] is one else leaves


def tensors_of(batch: Any) -> list[Tensor]:
    """Returns all tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, (str, bytes)):
        return []
    entries = _entries(batch) or []
    inner = entries.values() if isinstance(entries, dict) else entries
    return [tensor for one in inner for tensor in tensors_of(one)]


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Returns a copy of a batch with ``function`` of each tensor in its place."""
    if isinstance(batch, Tensor):
        return function(batch)
    leaves, structure = tree_flatten(batch)
    if len(leaves) != 1 or leaves[0] is not batch:
        return tree_unflatten([map_tensors(function, leaf) for leaf in leaves], structure)
    # What pytree does not know: BatchEncoding and other mappings, dataclasses, kinds of lists.
    is_data = dataclasses.is_dataclass(batch) and not isinstance(batch, type)
    if not is_data and not isinstance(batch, (MutableMapping, list)):
        return batch
    made = copy.copy(batch)
    entries = _entries(batch) or []
    named = entries.items() if isinstance(entries, dict) else enumerate(entries)
    for key, one in named:
        if is_data:
            # Also of a frozen one.
            object.__setattr__(made, str(key), map_tensors(function, one))
        else:
            made[key] = map_tensors(function, one)
    return made


def without_values(batch: Any) -> Any:
    """Returns a batch of the same shapes and dtypes on the meta device."""
    return map_tensors(lambda one: torch.empty_like(one, device="meta"), batch)

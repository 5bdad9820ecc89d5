"""Selective recomputation of activations.

While a block runs, every operation without a hidden effect (element by element, casts, copies,
norms, softmax) is noted with its inputs. When the block has ended, what autograd saved for the
backward pass is looked through: a tensor that can be computed by such operations from others that
are kept anyway is released, and computed again when backward needs it. Products,
convolutions and attention are kept, and whatever is random or changed in place: so nothing of the
block runs a second time but these operations, on the same inputs, and no number changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch import (
    CHEAP_OPERATIONS,
    StorageWeakRef,
    TorchDispatchMode,
    detach_sharing_version,
    schema_of,
    storage_key,
    version_of,
    without_autocast_key,
)

_KNOWN: dict[Any, bool] = {}
# What is smaller than this share of all that a block saves stays.
_LEAST_SHARE = 1 / 256


def _is_cheap(operation: Any) -> bool:
    """Whether ``operation`` can be repeated at little cost and with the same result."""
    if operation not in _KNOWN:
        tags = getattr(operation, "tags", ())
        pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        schema = schema_of(operation)
        _KNOWN[operation] = (
            (pointwise or operation in CHEAP_OPERATIONS)
            and schema is not None
            and not schema.is_mutable
            and all(argument.name != "generator" for argument in schema.arguments)
        )
    return _KNOWN[operation]


class BlockCall:
    """One call of a block whose activations are kept; it is alive as long as something of it is."""

    def __init__(self, ended: Any) -> None:
        weakref.finalize(self, ended).atexit = False


class SavedTensor:
    """A tensor that waits for the backward pass."""

    __slots__ = ("call", "tensor", "version")

    def __init__(self, tensor: Tensor, call: BlockCall) -> None:
        # A view: the tensor itself may know the node that keeps it, and neither would be freed.
        self.tensor = tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        self.version, self.call = version_of(tensor), call

    def value(self) -> Tensor:
        """Returns the tensor."""
        return _unchanged(self.tensor, self.version)


class RecomputableTensor:
    """A tensor that the backward pass may compute again."""

    __slots__ = ("call", "geometry", "op")

    def __init__(self, tensor: Tensor, op: RecordedOp, call: BlockCall) -> None:
        self.op, self.geometry, self.call = op, _geometry(tensor), call
        op.waiting += 1
        op.uses += 1
        if op.tensor is None:
            op.tensor = tensor.detach()

    def value(self) -> Tensor:
        """Returns the tensor, or computes it."""
        op = self.op
        base = op.value()
        op.waiting -= 1
        if op.waiting <= 0:
            # Backward may come once more.
            op.waiting = op.uses
            if not op.stays:
                op.tensor = None
        return torch.as_strided(base, *self.geometry)


class OpInput:
    """An input of a recipe: the result of another one, or a tensor that must then be kept."""

    __slots__ = ("bytes", "geometry", "key", "op", "tensor", "version")

    def __init__(self, tensor: Tensor, op: RecordedOp | None) -> None:
        self.op, self.geometry = op, _geometry(tensor)
        self.version = version_of(tensor)
        self.tensor: Any = None
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage_key(storage), storage.nbytes()
        if op is None:
            self.tensor = (
                tensor if isinstance(tensor, nn.Parameter) else detach_sharing_version(tensor)
            )

    def value(self) -> Tensor:
        """Returns the tensor, or computes it."""
        if self.op is None:
            return _unchanged(self.tensor, self.version)
        return torch.as_strided(self.op.value(), *self.geometry)


class RecordedOp:
    """How one new storage came about.

    Attributes:
        tensor: The result, while it is there.
        stays: Whether it stays; otherwise it is computed when it is needed.
        uses: How often autograd saved it.
        waiting: How many of those backward has not used yet.
    """

    __slots__ = (
        "arguments", "bytes", "dtype", "index", "key", "operation", "reference", "stays", "tensor",
        "uses", "version", "waiting",
    )  # fmt: skip

    def __init__(self, operation: Any, arguments: Any, index: int | None, result: Tensor) -> None:
        self.operation, self.arguments, self.index = operation, arguments, index
        storage = result.untyped_storage()
        # While a weak reference exists, no other storage gets the same key.
        self.reference = StorageWeakRef(storage)
        self.key, self.bytes = storage_key(storage), storage.nbytes()
        self.dtype, self.version = result.dtype, version_of(result)
        self.tensor: Tensor | None = None
        self.stays, self.uses, self.waiting = True, 0, 0

    def inputs(self) -> Iterator[OpInput]:
        """Yields the inputs."""
        for argument in (*self.arguments[0], *self.arguments[1].values()):
            for one in argument if isinstance(argument, list) else (argument,):
                if isinstance(one, OpInput):
                    yield one

    def value(self) -> Tensor:
        """Returns the result; computes it where it was released."""
        if self.tensor is not None:
            return _unchanged(self.tensor, self.version) if self.stays else self.tensor
        positional, named = self.arguments
        results = self.operation(
            *map(_evaluated, positional), **{k: _evaluated(v) for k, v in named.items()}
        )
        result: Tensor = results if self.index is None else results[self.index]
        if self.uses:
            self.tensor = result
        return result


class OpRecorder(TorchDispatchMode):
    """Notes what happens in a block, and decides at its end what is kept of it.

    Attributes:
        saved: Bytes by storage of all that autograd saved, without weights.
        kept: Bytes by storage of what has to be kept; after :meth:`decide`.
    """

    # By which layers know it that are better noted as a whole.
    records_ops = True

    def __init__(self, call: BlockCall, weights: set[int]) -> None:
        super().__init__()
        self.call, self.weights = call, weights
        self.saved: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self._made: dict[int, RecordedOp] = {}
        self._opaque: list[Any] = []
        self._recorded: dict[int, RecordedOp] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and notes it if it can be repeated."""
        kwargs = kwargs or {}
        if not _is_cheap(func):
            return func(*args, **kwargs)
        # Before it runs: an input that is not kept may be gone afterwards.
        positional = [self._encoded(one) for one in args]
        named = {name: self._encoded(one) for name, one in kwargs.items()}
        result = func(*args, **kwargs)
        several = isinstance(result, (tuple, list))
        for index, one in enumerate(result if several else (result,)):
            if isinstance(one, Tensor) and one.numel():
                op = RecordedOp(func, (positional, named), index if several else None, one)
                if all(source.key != op.key for source in op.inputs()):
                    self._made[op.key] = op
        return result

    def _encoded(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._encoded(one) for one in argument]
        if not isinstance(argument, Tensor):
            return argument
        return OpInput(argument, self._op_of(argument))

    def _op_of(self, tensor: Tensor) -> RecordedOp | None:
        op = self._made.get(storage_key(tensor.untyped_storage()))
        if op is None or op.version != version_of(tensor) or op.dtype != tensor.dtype:
            return None
        return None if tensor.is_conj() or tensor.is_neg() else op

    def record_saved(self, tensor: Tensor) -> RecordedOp | None:
        """Enters a tensor that autograd saves; returns its recipe, if it has one."""
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self.weights:
            return None
        self.saved[key] = storage.nbytes()
        op = self._op_of(tensor)
        if op is None:
            # A weak reference, so that no later storage is taken for this one.
            self._opaque.append(StorageWeakRef(storage))
            self.kept[key] = storage.nbytes()
        else:
            self._recorded[key] = op
        return op

    def pack(self, tensor: Tensor) -> SavedTensor | RecomputableTensor:
        """Keeps a tensor for autograd, for the time being."""
        op = self.record_saved(tensor)
        return (
            SavedTensor(tensor, self.call)
            if op is None
            else RecomputableTensor(tensor, op, self.call)
        )

    def decide(self) -> None:
        """Lets go of what others lead to that are kept, where that is less memory."""
        least = _LEAST_SHARE * sum(self.saved.values())
        for op in self._made.values():
            if op.key not in self._recorded or op.key in self.kept:
                continue
            needed: dict[int, int] = {}
            possible = self._collect(op, needed, set())
            if possible and op.bytes - sum(needed.values()) >= least:
                self.kept.update(needed)
                op.stays = False
            else:
                self.kept[op.key] = op.bytes
        for op in self._recorded.values():
            if op.stays:
                op.arguments = ((), {})
            else:
                op.tensor = None
        # Autograd keeps the hooks, and they this object.
        self._made.clear()
        self._recorded.clear()
        self._opaque.clear()

    def _collect(self, op: RecordedOp, needed: dict[int, int], seen: set[int]) -> bool:
        """Collects the unsaved tensors that a recipe needs; ``False`` where it was changed."""
        if id(op) in seen:
            return True
        seen.add(id(op))
        for source in op.inputs():
            if source.op is None:
                if version_of(source.tensor) != source.version:
                    return False
                if source.key not in self.kept and source.key not in self.weights:
                    needed[source.key] = source.bytes
            elif source.key in self.kept and source.key in self._recorded:
                continue
            elif not self._collect(source.op, needed, seen):
                return False
        return True


def unpack(waiting: SavedTensor | RecomputableTensor) -> Tensor:
    """Gives autograd what it saved."""
    if isinstance(waiting, SavedTensor):
        return waiting.value()
    # The casts that autocast made are operations of the recipe.
    with torch.no_grad(), without_autocast_key():
        return waiting.value()


def _evaluated(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_evaluated(one) for one in argument]
    return argument.value() if isinstance(argument, OpInput) else argument


def _geometry(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if version_of(tensor) != version:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in "
            f"place after it was saved (version {version_of(tensor)}, expected {version}). Use the "
            "operation that is not in place, or gradient_checkpointing=False."
        )
    return tensor

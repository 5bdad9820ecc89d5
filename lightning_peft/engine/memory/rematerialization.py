"""Keeping of a forward pass what is costly to compute, and the way to the rest instead of the rest.

While a block runs, every operation without a hidden effect (element by element, casts, copies,
norms, softmax) is noted with its inputs. When the block has ended, what autograd saved for the
backward pass is looked through: a tensor that can be computed by such operations from others that
are kept anyway is let go, and backward computes it again when it asks for it. Products,
convolutions and attention are kept, and whatever is random or changed in place: so nothing of the
block runs a second time but these operations, on the same inputs, and no number changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Beside all operations that torch marks as pointwise. Each makes new memory for its results.
_CHEAP = {
    _aten._to_copy.default, _aten.clone.default, _aten.cat.default, _aten.stack.default,
    _aten.native_layer_norm.default, _aten.native_group_norm.default,
    _aten._fused_rms_norm.default, _aten._softmax.default, _aten._log_softmax.default,
    _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.var_mean.correction,
    _aten.constant_pad_nd.default,
}  # fmt: skip
_KNOWN: dict[Any, bool] = {}
# What is smaller than this share of all that a block saves stays.
_LEAST_SHARE = 1 / 256


def _is_cheap(operation: Any) -> bool:
    """Says whether ``operation`` can be repeated at little cost and with the same result."""
    if operation not in _KNOWN:
        tags = getattr(operation, "tags", ())
        pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        schema = getattr(operation, "_schema", None)
        _KNOWN[operation] = (
            (pointwise or operation in _CHEAP)
            and schema is not None
            and not schema.is_mutable
            and all(argument.name != "generator" for argument in schema.arguments)
        )
    return _KNOWN[operation]


class Call:
    """One call of a block whose activations are kept; it is alive as long as something of it is.

    Args:
        ended: Called when the backward pass has let go of everything.
    """

    def __init__(self, ended: Any) -> None:
        weakref.finalize(self, ended).atexit = False


class Kept:
    """A tensor that waits for the backward pass."""

    __slots__ = ("call", "tensor", "version")

    def __init__(self, tensor: Tensor, call: Call) -> None:
        # A view: the tensor itself may know the node that keeps it, and neither would be freed.
        self.tensor = tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        self.version, self.call = _version(tensor), call

    def value(self) -> Tensor:
        """Returns the tensor.

        Raises:
            RuntimeError: If it was changed in place since.
        """
        return _unchanged(self.tensor, self.version)


class Promised:
    """A tensor that the backward pass may compute again."""

    __slots__ = ("call", "geometry", "recipe")

    def __init__(self, tensor: Tensor, recipe: Recipe, call: Call) -> None:
        self.recipe, self.geometry, self.call = recipe, _geometry(tensor), call
        recipe.waiting += 1
        recipe.uses += 1
        if recipe.tensor is None:
            recipe.tensor = tensor.detach()

    def value(self) -> Tensor:
        """Returns the tensor, or computes it."""
        recipe = self.recipe
        base = recipe.value()
        recipe.waiting -= 1
        if recipe.waiting <= 0:
            # Backward may come once more.
            recipe.waiting = recipe.uses
            if not recipe.stays:
                recipe.tensor = None
        return torch.as_strided(base, *self.geometry)


class Source:
    """An input of a recipe: the result of another one, or a tensor that must then be kept."""

    __slots__ = ("bytes", "geometry", "key", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor, recipe: Recipe | None) -> None:
        self.recipe, self.geometry = recipe, _geometry(tensor)
        self.version = _version(tensor)
        self.tensor: Any = None
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage._cdata, storage.nbytes()
        if recipe is None:
            self.tensor = tensor if isinstance(tensor, nn.Parameter) else _detached(tensor)

    def value(self) -> Tensor:
        """Returns the tensor, or computes it."""
        if self.recipe is None:
            return _unchanged(self.tensor, self.version)
        return torch.as_strided(self.recipe.value(), *self.geometry)


class Recipe:
    """How one new storage came about.

    Attributes:
        tensor: The result, while it is there.
        stays: Whether it stays; otherwise it is computed when it is needed.
        uses: How often autograd saved it.
        waiting: How many of those backward has not asked for yet.
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
        self.key, self.bytes = storage._cdata, storage.nbytes()
        self.dtype, self.version = result.dtype, _version(result)
        self.tensor: Tensor | None = None
        self.stays, self.uses, self.waiting = True, 0, 0

    def sources(self) -> Iterator[Source]:
        """Yields the inputs."""
        for argument in (*self.arguments[0], *self.arguments[1].values()):
            for one in argument if isinstance(argument, list) else (argument,):
                if isinstance(one, Source):
                    yield one

    def value(self) -> Tensor:
        """Returns the result; computes it where it was let go."""
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


class Recorder(TorchDispatchMode):
    """Notes what happens in a block, and decides at its end what is kept of it.

    Args:
        call: The call.
        weights: Keys of the storages that are there anyway.

    Attributes:
        saved: Bytes by storage of all that autograd saved, without weights.
        kept: Bytes by storage of what has to be kept; after :meth:`decide`.
    """

    # By which layers know it that are better noted as a whole.
    notes_operations = True

    def __init__(self, call: Call, weights: set[int]) -> None:
        super().__init__()
        self.call, self.weights = call, weights
        self.saved: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self._made: dict[int, Recipe] = {}
        self._opaque: list[Any] = []
        self._recorded: dict[int, Recipe] = {}

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
                recipe = Recipe(func, (positional, named), index if several else None, one)
                if all(source.key != recipe.key for source in recipe.sources()):
                    self._made[recipe.key] = recipe
        return result

    def _encoded(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [self._encoded(one) for one in argument]
        if not isinstance(argument, Tensor):
            return argument
        return Source(argument, self._recipe_of(argument))

    def _recipe_of(self, tensor: Tensor) -> Recipe | None:
        recipe = self._made.get(tensor.untyped_storage()._cdata)
        if recipe is None or recipe.version != _version(tensor) or recipe.dtype != tensor.dtype:
            return None
        return None if tensor.is_conj() or tensor.is_neg() else recipe

    def note(self, tensor: Tensor) -> Recipe | None:
        """Enters a tensor that autograd saves; returns its recipe, if it has one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.weights:
            return None
        self.saved[key] = storage.nbytes()
        recipe = self._recipe_of(tensor)
        if recipe is None:
            # A weak reference, so that no later storage is taken for this one.
            self._opaque.append(StorageWeakRef(storage))
            self.kept[key] = storage.nbytes()
        else:
            self._recorded[key] = recipe
        return recipe

    def pack(self, tensor: Tensor) -> Kept | Promised:
        """Keeps a tensor for autograd, for the time being."""
        recipe = self.note(tensor)
        return Kept(tensor, self.call) if recipe is None else Promised(tensor, recipe, self.call)

    def decide(self) -> None:
        """Lets go of what others lead to that are kept, where that is less memory."""
        least = _LEAST_SHARE * sum(self.saved.values())
        for recipe in self._made.values():
            if recipe.key not in self._recorded or recipe.key in self.kept:
                continue
            needed: dict[int, int] = {}
            possible = self._collect(recipe, needed, set())
            if possible and recipe.bytes - sum(needed.values()) >= least:
                self.kept.update(needed)
                recipe.stays = False
            else:
                self.kept[recipe.key] = recipe.bytes
        for recipe in self._recorded.values():
            if recipe.stays:
                recipe.arguments = ((), {})
            else:
                recipe.tensor = None
        # Autograd keeps the hooks, and they this object.
        self._made.clear()
        self._recorded.clear()
        self._opaque.clear()

    def _collect(self, recipe: Recipe, needed: dict[int, int], seen: set[int]) -> bool:
        """Collects what a recipe needs beside what is kept; ``False`` where it was changed."""
        if id(recipe) in seen:
            return True
        seen.add(id(recipe))
        for source in recipe.sources():
            if source.recipe is None:
                if _version(source.tensor) != source.version:
                    return False
                if source.key not in self.kept and source.key not in self.weights:
                    needed[source.key] = source.bytes
            elif source.key in self.kept and source.key in self._recorded:
                continue
            elif not self._collect(source.recipe, needed, seen):
                return False
        return True


def unpack(waiting: Kept | Promised) -> Tensor:
    """Gives autograd what it saved."""
    if isinstance(waiting, Kept):
        return waiting.value()
    # The casts that autocast made are operations of the recipe.
    with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return waiting.value()


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in ("AutocastCUDA", "AutocastXPU", "AutocastMPS"):
    if hasattr(torch._C.DispatchKey, _key):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def _evaluated(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_evaluated(one) for one in argument]
    return argument.value() if isinstance(argument, Source) else argument


def _geometry(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _detached(tensor: Tensor) -> Tensor:
    # Below autograd, where operations are recorded, a view would get a version of its own.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if _version(tensor) != version:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in "
            f"place after it was saved (version {_version(tensor)}, expected {version}). Use the "
            "operation that is not in place, or gradient_checkpointing=False."
        )
    return tensor

"""In-place change of a layer's class, which keeps all references valid.

Replacing a layer in its parent breaks aliases, ``isinstance`` tests, attribute reads, weight ties
and the names of base parameters. Giving the object a subclass of its own class keeps them all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.compat.torch_distributed import is_fsdp_asking
from lightning_peft.engine.layers.weight_view import WeightView, replacement_error, with_gradient
from lightning_peft.errors import LifecycleError, UnsupportedError


class DynamicMixin:
    """Base of all mixins that the class of a module is extended with at run time."""

    label: ClassVar[str] = ""
    mixins: ClassVar[tuple[type[DynamicMixin], ...]] = ()
    base_class: ClassVar[type[nn.Module]] = nn.Module
    origin_class: ClassVar[type[nn.Module]] = nn.Module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists only at run time, so copy and pickle get its key instead of a name.
        state: Callable[[], Any] = getattr(self, "__getstate__", self.__dict__.copy)
        return empty_layer, class_key(self), state()


class LayerMixin(DynamicMixin):
    """Base of the mixins for layers, which know what their weight stands for.

    A mixin overrides ``forward`` and calls ``super().forward``: the class that the layer had
    before comes next in the method resolution order.
    """

    # Whether `forward` is the product with the weight, whatever class lies below.
    standard_forward: ClassVar[bool] = False
    # What the parameter is called; not "weight" where code of the layer's class reads it.
    weight_name: ClassVar[str] = "weight"
    # Whether the stored weight is spread over processes, outside of the forward pass.
    is_sharded = False

    _parameters: dict[str, Any]

    @property
    def weight(self) -> Any:
        """The weight as code means it that reads it instead of calling the layer.

        The stored parameter where that is the whole truth or the layer itself asks; else a
        :class:`WeightView` of the dequantized weight plus the active adapters, or that weight
        itself within ``torch.compile``.
        """
        if self.weight_name != "weight":
            raise AttributeError(f"{type(self).__name__} has no attribute 'weight'")
        return self.read_weight()

    def read_weight(self) -> Any:
        """Returns the weight as :attr:`weight` gives it."""
        stored = self._parameters[self.weight_name]
        if self.__dict__.get("in_own_forward") or self.weight_is_stored():
            return stored
        # FSDP alone gets the part that it left here; others mean the weight.
        if self.is_sharded and is_fsdp_asking(sys._getframe(1)):
            return stored
        if torch.compiler.is_compiling():
            # The compiler knows no tensors that are not there yet; it drops what is not used.
            return self.effective_weight()
        shape, dtype = self.weight_info()
        compute, sources = self.weight_as_now(self.effective_weight)
        return with_gradient(partial(WeightView, compute, shape, dtype, stored), [stored, *sources])

    def register_parameter(self, name: str, param: Any) -> None:
        """Registers a parameter, unless it stands for the weight or bias from now on."""
        stem = name.partition("_")[0]
        if name != stem and stem in ("weight", "bias"):
            raise replacement_error(stem)
        super().register_parameter(name, param)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias") and self._parameters.get(name) is not None:
            raise replacement_error(name)
        super().__delattr__(name)

    def __prepare_scriptable__(self) -> Any:
        raise UnsupportedError(
            f"torch.jit.script, as of to_torchscript(), does not know the class of adapted and "
            f"quantized layers ({type(self).__name__}). Call lightning_peft.merge and unload "
            "first, or trace: to_torchscript(method='trace', example_inputs=...)."
        )

    def weight_as_now(
        self, compute: Callable[[], Tensor]
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Returns ``compute`` with the adapters that run now, and what trains of these."""
        return compute, []

    def stored_weight(self) -> Any:
        """The stored weight as the layer's backend takes it; ``None`` where there is none."""
        return self._parameters.get(self.weight_name)

    def weight_is_stored(self) -> bool:
        """Whether the stored parameter is the weight that the layer computes with."""
        return True

    def weight_info(self) -> tuple[torch.Size, torch.dtype]:
        """Returns shape and dtype of the effective weight, without computing it."""
        stored = self._parameters[self.weight_name]
        return stored.shape, stored.dtype

    def effective_weight(self) -> Tensor:
        """Returns the weight that the layer computes with, in the layout of its class."""
        stored: Tensor = self._parameters[self.weight_name]
        require_whole(stored)
        return stored

    def store_weight(self, weight: Tensor) -> None:
        """Writes new values into the stored weight, which is dense."""
        self._parameters[self.weight_name].copy_(weight)

    @contextmanager
    def own_forward(self) -> Iterator[None]:
        """Within the body, the layer's own code reads the stored weight."""
        outer = self.__dict__.get("in_own_forward", False)
        self.__dict__["in_own_forward"] = True
        try:
            yield
        finally:
            self.__dict__["in_own_forward"] = outer


def require_whole(stored: Any, count: int = 1) -> None:
    """Refuses to read a frozen weight that is spread over processes."""
    if hasattr(stored, "device_mesh"):
        count = stored.device_mesh.size()
    if count > 1:
        raise LifecycleError(
            "A frozen weight is read outside of the forward pass of its block, and "
            f"sharding='fsdp2' keeps 1/{count} of it in this process then. "
            "Call the module instead, in all processes; to read, merge or export weights, load "
            "the checkpoint in one process by lightning_peft.load_from_checkpoint."
        )


ClassKey = tuple[tuple[type[DynamicMixin], ...], type[nn.Module], type[nn.Module]]

_CLASSES: dict[ClassKey, type[nn.Module]] = {}


def class_key(layer: Any) -> ClassKey:
    """Returns the mixins of ``layer``, the class below them, and the class it had at first."""
    cls = type(layer)
    if not isinstance(layer, DynamicMixin):
        return (), cls, cls
    return cls.mixins, cls.base_class, cls.origin_class


def class_for_key(key: ClassKey) -> type[nn.Module]:
    """Returns the class of a key, always the same one for the same key."""
    mixins, base, origin = key
    if not mixins:
        return origin
    if key not in _CLASSES:
        name = "".join(mixin.label for mixin in mixins) + origin.__name__
        body = {"mixins": mixins, "base_class": base, "origin_class": origin}
        _CLASSES[key] = type(name, (*mixins, base), body)
    return _CLASSES[key]


def empty_layer(*key: Any) -> nn.Module:
    """Returns an empty object of the class of a key, for copy and pickle."""
    cls = class_for_key(key)
    return cls.__new__(cls)


class AttentionWeight(LayerMixin):
    """``nn.MultiheadAttention``, whose weight for queries, keys and values is read by its code."""

    weight_name = "in_proj_weight"

    def __getattr__(self, name: str) -> Any:
        # Reached for parameters and submodules.
        stored = super().__getattr__(name)  # type: ignore[misc]
        return self.read_weight() if name == self.weight_name else stored


def weight_key(layer: Any) -> str:
    """Returns the name in ``layer`` of the parameter that is its weight."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"


def stored_parameter(layer: Any, name: str | None = None) -> Any:
    """Returns a stored parameter of ``layer``: its weight, or the one called ``name``.

    ``layer.weight`` may only stand for it.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return base._parameters[name or weight_key(base)]


def add_mixin(
    layer: nn.Module, mixin: type[DynamicMixin], base: type[nn.Module] | None = None
) -> None:
    """Puts ``mixin`` in front of the class of ``layer``."""
    mixins, below, origin = class_key(layer)
    layer.__class__ = class_for_key(((mixin, *mixins), base or below, origin))


def remove_mixin(layer: nn.Module, mixin: type[DynamicMixin]) -> None:
    """Takes ``mixin`` out of the class of ``layer`` again; the inverse of :func:`add_mixin`.

    A layer that loses its last mixin gets its original class back.
    """
    mixins, base, origin = class_key(layer)
    rest = tuple(kept for kept in mixins if kept is not mixin)
    layer.__class__ = class_for_key((rest, base, origin))

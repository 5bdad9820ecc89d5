"""Changing the class of a layer object, so that nothing that refers to the layer has to change.

Replacing a layer in its parent breaks aliases, ``isinstance`` tests, attribute reads, weight ties
and the names of base parameters. Giving the object a subclass of its own class keeps them all.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class InPlace:
    """Base of the mixins that a layer's class is extended with at run time.

    A mixin overrides ``forward`` and calls ``super().forward``: the class that the layer had
    before comes next in the method resolution order.
    """

    label: ClassVar[str] = ""
    mixins: ClassVar[tuple[type[InPlace], ...]] = ()
    base_class: ClassVar[type[nn.Module]] = nn.Module
    origin_class: ClassVar[type[nn.Module]] = nn.Module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists only at run time, so copy and pickle get the recipe instead of a name.
        cls = type(self)
        return _rebuild, (cls.mixins, cls.base_class, cls.origin_class), self.__dict__


_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def _class_of(
    mixins: tuple[type[InPlace], ...], base: type[nn.Module], origin: type[nn.Module]
) -> type[nn.Module]:
    if not mixins:
        return base
    key = (mixins, base, origin)
    if key not in _CLASSES:
        name = "".join(mixin.label for mixin in mixins) + origin.__name__
        body = {"mixins": mixins, "base_class": base, "origin_class": origin}
        _CLASSES[key] = type(name, (*mixins, base), body)
    return _CLASSES[key]


def _rebuild(
    mixins: tuple[type[InPlace], ...], base: type[nn.Module], origin: type[nn.Module]
) -> nn.Module:
    cls = _class_of(mixins, base, origin)
    return cls.__new__(cls)


def extend(layer: nn.Module, mixin: type[InPlace], base: type[nn.Module] | None = None) -> None:
    """Puts ``mixin`` in front of the class of ``layer``.

    Args:
        layer: The layer object; it stays the same object.
        mixin: The behaviour to add.
        base: Replaces the class below the mixins, for layers that turn into a library's own
            subclass of what they were (``nn.Linear`` into ``bitsandbytes.nn.Linear4bit``).
    """
    cls = type(layer)
    known = issubclass(cls, InPlace)
    mixins = cls.mixins if known else ()
    origin = cls.origin_class if known else cls
    base = base or (cls.base_class if known else cls)
    layer.__class__ = _class_of((mixin, *mixins), base, origin)


def retract(layer: nn.Module, mixin: type[InPlace]) -> None:
    """Takes ``mixin`` out of the class of ``layer`` again; the inverse of :func:`extend`.

    A layer that loses its last mixin gets its original class back.
    """
    cls = type(layer)
    rest = tuple(kept for kept in cls.mixins if kept is not mixin)
    layer.__class__ = (
        _class_of(rest, cls.base_class, cls.origin_class) if rest else cls.origin_class
    )

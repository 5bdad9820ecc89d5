"""In-place extension of Lightning objects by a mixin class."""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from typing import Any


class MixedClassMeta(ABCMeta):
    """Metaclass of the classes that :func:`mixed_class` makes.

    Pickle looks a class up by its name in a module, and these are in none: it gets what they are
    made of instead.
    """


_MIXED_CLASSES: dict[tuple[type, type], Any] = {}


def mixed_class(mixin: type, cls: type) -> Any:
    """Returns a class with ``mixin`` in front of ``cls``, always the same one for the same two.

    An object of ``cls`` can be given this class, if ``mixin`` has no slots and no base of its own
    besides those of ``cls``.
    """
    key = (mixin, cls)
    if key not in _MIXED_CLASSES:
        name = f"{mixin.__name__.lstrip('_')}{cls.__name__}"
        _MIXED_CLASSES[key] = MixedClassMeta(
            name, key, {"__module__": cls.__module__, "mixed_from": key}
        )
    return _MIXED_CLASSES[key]


def _reduce_class(cls: Any) -> Any:
    mixed_from = cls.__dict__.get("mixed_from")
    return cls.__qualname__ if mixed_from is None else (mixed_class, mixed_from)


copyreg.pickle(MixedClassMeta, _reduce_class)

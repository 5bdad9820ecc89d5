"""Objects of Lightning that get more behaviour while they stay the objects that they are."""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from typing import Any


class MadeClass(ABCMeta):
    """Metaclass of the classes that :func:`extended` makes.

    Pickle looks a class up by its name in a module, and these are in none: it gets what they are
    made of instead.
    """


_MADE: dict[tuple[type, type], Any] = {}


def extended(mixin: type, cls: type) -> Any:
    """Returns a class with ``mixin`` in front of ``cls``, always the same one for the same two.

    An object of ``cls`` can be given this class, if ``mixin`` has no slots and no base of its own
    besides those of ``cls``.
    """
    key = (mixin, cls)
    if key not in _MADE:
        name = f"{mixin.__name__.lstrip('_')}{cls.__name__}"
        _MADE[key] = MadeClass(name, key, {"__module__": cls.__module__, "made_of": key})
    return _MADE[key]


def _recipe(cls: Any) -> Any:
    made_of = cls.__dict__.get("made_of")
    return cls.__qualname__ if made_of is None else (extended, made_of)


copyreg.pickle(MadeClass, _recipe)

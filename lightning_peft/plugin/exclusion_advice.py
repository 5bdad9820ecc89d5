"""How to leave parts as they are that got adapters and do not train."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def exclusion_advice(idle: Collection[str], parts: Iterable[str]) -> str:
    """Returns a sentence that says which setting leaves adapted parts as they are.

    Args:
        idle: Names of the parts that do not train; ``""`` is the module itself.
        parts: Names of all adapted parts.
    """
    others = [name for name in parts if name not in idle]
    if "" in idle:
        return "Adapt the submodules that are trained, by name in `adapt`. "
    names = " and ".join(repr(name) for name in idle)
    if others:
        return (
            f"To leave {names} without adapters, freeze what is not trained by "
            f"requires_grad_(False) in `__init__`, or pass adapt={others!r}. "
        )
    return (
        f"To leave {names} as the module froze it, and to adapt the other layers of the module, "
        "pass adapt=''; `exclude_modules` takes single layers out. "
    )

"""Lazy loading of public names, declared in type stubs.

Not ``lazy_loader.attach_stub``: it keeps every value, and loads all of them at once under
``EAGER_IMPORT``, while classes with a Lightning base depend on which Lightning is imported.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError
from lightning_peft.torchvision_errors import loading_problem


def attach_stub(
    package: str, bind: Callable[[Any], Any] | None = None, bound: tuple[str, ...] = ("",)
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns ``__getattr__``, ``__dir__`` and ``__all__`` of ``package``, from its ``.pyi``.

    ``bind`` is called at each access of a value whose module starts with one of ``bound``.
    """
    module = sys.modules[package]
    stub = ast.parse(Path(module.__path__[0], "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    home_of = {alias.name: node.module or "" for node in imports for alias in node.names}

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{package}.{home_of[name]}"), name)
        except Exception as error:
            problem = loading_problem(error)
            if problem is None:
                raise
            raise ConfigError(problem) from error
        if bind is not None and home_of[name].startswith(bound):
            return bind(value)
        setattr(module, name, value)
        return value

    return load, lambda: sorted({*vars(module), *home_of}), sorted(home_of)

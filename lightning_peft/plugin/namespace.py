"""One set of classes for two Lightning packages.

``lightning.pytorch`` and ``pytorch_lightning`` are separate class trees with the same code: a
strategy that derives from one is refused by the other's Trainer. Classes here are written once,
without a Lightning base; the base is added when an instance is made, from the tree in use.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import Any, ClassVar

from lightning_peft.errors import ConfigError

ROOTS = ("lightning.pytorch", "pytorch_lightning")

_explicit_namespace: str | None = None
_bound_classes: dict[tuple[type, str], type] = {}


def use_namespace(root: str | None) -> None:
    """Says which Lightning package new objects belong to; ``None`` goes back to finding out.

    Only needed where both packages are imported in one process and something other than a
    strategy is made: a strategy joins the Trainer that it is given to.

    Args:
        root: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.

    Raises:
        ConfigError: If it is neither.
    """
    global _explicit_namespace
    if root is not None and root not in ROOTS:
        raise ConfigError(f"use_namespace({root!r}): the packages are {' and '.join(ROOTS)}.")
    _explicit_namespace = root


def namespace_in_use() -> str:
    """Returns the root of the Lightning package that this process uses.

    The one chosen by :func:`use_namespace`, else the one imported so far, else the one installed.
    """
    if _explicit_namespace is not None:
        return _explicit_namespace
    loaded = [root for root in ROOTS if root in sys.modules]
    if len(loaded) == 1:
        return loaded[0]
    return _in_callers(loaded or list(ROOTS)) or (loaded or _installed())[0]


def _installed() -> list[str]:
    found = [root for root in ROOTS if find_spec(root.partition(".")[0]) is not None]
    if not found:
        raise ConfigError(
            "Neither `lightning` nor `pytorch_lightning` is installed. "
            "Install one: pip install lightning"
        )
    return found


def _in_callers(roots: list[str]) -> str | None:
    # The nearest caller whose module refers to exactly one of the trees decides.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(("lightning_peft", "jsonargparse")):
            seen = {_namespace_named(value) for value in frame.f_globals.values()} & set(roots)
            if len(seen) == 1:
                return seen.pop()
        frame = frame.f_back
    return None


def _namespace_named(value: object) -> str | None:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if not isinstance(value, (type, ModuleType)) or not isinstance(name, str):
        return None
    return next((r for r in ROOTS if name == r or name.startswith(f"{r}.")), None)


def namespace_of_class(cls: type) -> str | None:
    """Returns the root of the Lightning package that ``cls`` derives from, if any."""
    return next((root for base in cls.__mro__ if (root := _namespace_named(base))), None)


def namespace_of(instance: object) -> str | None:
    """Returns the root of the Lightning package that the class of ``instance`` derives from."""
    return namespace_of_class(type(instance))


class LateBoundMeta(ABCMeta):
    """Metaclass of classes that get their Lightning base when an instance is made.

    A class names its base in ``lightning_base``, as ``"module.Class"`` below the root. Calling
    the class makes an instance of a subclass that also derives from that base; subclasses by the
    user work the same way. Missing class attributes are looked up on that subclass.
    """

    lightning_base: str
    lightning_root: str | None = None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes an instance for the namespace in use."""
        if cls.lightning_root is not None:
            return super().__call__(*args, **kwargs)
        return bind_to_lightning(cls, namespace_in_use())(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, which ``__call__`` would hide."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getattr__(cls, name: str) -> Any:
        """Finds Lightning's own class attributes (``load_from_checkpoint``) on the real class."""
        if name.startswith("_") or cls.__dict__.get("lightning_root") is not None:
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")
        return getattr(bind_to_lightning(cls, namespace_in_use()), name)


def bind_to_lightning(cls: type, root: str) -> Any:
    """Returns the subclass of ``cls`` that derives from its Lightning base in ``root``."""
    key = (cls, root)
    if key not in _bound_classes:
        module, _, name = cls.lightning_base.rpartition(".")  # type: ignore[attr-defined]
        base = getattr(import_module(f"{root}.{module}"), name)
        body = {
            "lightning_root": root,
            "lightning_class": base,
            "unbound_class": cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        _bound_classes[key] = type(cls)(cls.__name__, (cls, base), body)
    return _bound_classes[key]


def _reduce_class(cls: Any) -> Any:
    """Returns how pickle finds a class: one made at run time by what it was made of."""
    if cls.__dict__.get("lightning_root") is None:
        return cls.__qualname__
    return bind_to_lightning, (cls.unbound_class, cls.lightning_root)


copyreg.pickle(LateBoundMeta, _reduce_class)


def bind_if_unambiguous(cls: Any) -> Any:
    """Returns ``cls`` with its Lightning base where it is clear which, else ``cls``.

    For LightningCLI, which checks the class before it makes an instance.
    """
    loaded = [root for root in ROOTS if f"{root}.trainer" in sys.modules]
    root = _explicit_namespace or (loaded[0] if len(loaded) == 1 else _cli_that_asks())
    return cls if root is None else bind_to_lightning(cls, root)


def _cli_that_asks() -> str | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        asking = frame.f_globals.get("__name__", "")
        if asking in [f"{root}.cli" for root in ROOTS]:
            return str(asking).removesuffix(".cli")
        frame = frame.f_back
    return None


class PostImportFinder(MetaPathFinder):
    """Runs a function once, right after a module was imported, whoever imports it.

    The names ``"lora"`` and ``"qlora"`` can only be registered where Lightning's registry exists,
    and importing Lightning for that would choose the tree for the user.
    """

    pending: ClassVar[dict[str, Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the module by the other finders and runs the function after its loader."""
        if fullname not in self.pending:
            return None
        function = self.pending.pop(fullname)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PostImportLoader(spec.loader, function)
        return spec


class _PostImportLoader(Loader):
    def __init__(self, loader: Loader, function: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.function = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # The module keeps no trace of this loader.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.function(module)


def call_after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls ``function(module)`` when module ``name`` is imported; at once if it already is."""
    module = sys.modules.get(name)
    # While a package is being imported its contents are not there yet; then wait as well.
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        function(module)
        return
    PostImportFinder.pending[name] = function
    if not any(isinstance(finder, PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportFinder())

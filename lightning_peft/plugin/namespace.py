"""Classes for both Lightning packages, their registration and in-place extension.

``lightning.pytorch`` and ``pytorch_lightning`` are separate class trees with the same code: a
strategy that derives from one is refused by the other's Trainer. Classes here are written once,
without a Lightning base; the base is added when an instance is made, from the tree in use.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_peft.errors import ConfigError

ROOTS = ("lightning.pytorch", "pytorch_lightning")

_explicit_namespace: str | None = None
_bound_classes: dict[tuple[Any, ...], type] = {}
_WRITTEN = "lightning_peft.plugin.strategies"
_STRATEGIES = {
    "lora": ("LoRAStrategy", "LoRA adapters on the pretrained parts, on one device or several"),
    "qlora": ("QLoRAStrategy", "LoRA adapters on a 4-bit (NF4) base, on one device or several"),
}


def use_namespace(root: str | None) -> None:
    """Sets the Lightning package that new objects belong to; ``None``: the imported one.

    Needed only where both packages are imported in one process, for all but strategies: these
    are bound to the Lightning of the Trainer that they are passed to.
    """
    global _explicit_namespace
    if root is not None and root not in ROOTS:
        raise ConfigError(f"use_namespace({root!r}): the packages are {' and '.join(ROOTS)}.")
    _explicit_namespace = root


@contextmanager
def namespace(root: str) -> Iterator[None]:
    """Within the body, new objects belong to ``root``, as after :func:`use_namespace`."""
    before = _explicit_namespace
    use_namespace(root)
    try:
        yield
    finally:
        use_namespace(before)


def namespace_in_use() -> str:
    """Returns the root of the Lightning package that this process uses.

    The one set by :func:`use_namespace`, else the one that is imported, else the one that is
    installed.
    """
    root = _explicit_namespace or _unambiguous("")
    if root is not None:
        return root
    if any(root in sys.modules for root in ROOTS):
        raise ConfigError(
            "Both lightning.pytorch and pytorch_lightning are imported in this process, and their "
            "classes do not mix. Call lightning_peft.use_namespace with the one whose Trainer you "
            "use, such as lightning_peft.use_namespace('lightning.pytorch')."
        )
    return _installed()[0]


def _unambiguous(part: str) -> str | None:
    """Returns the only root of which a part is imported."""
    imported = [root for root in ROOTS if f"{root}{part}" in sys.modules]
    return imported[0] if len(imported) == 1 else None


def _installed() -> list[str]:
    found = [root for root in ROOTS if find_spec(root.partition(".")[0]) is not None]
    if not found:
        raise ConfigError(
            "Neither `lightning` nor `pytorch_lightning` is installed. "
            "Install one: pip install lightning"
        )
    return found


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
    # Whether instances are bound again, to the Lightning of the Trainer that they are passed to.
    rebinds = False

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes an instance for the namespace in use."""
        if cls.lightning_root is not None:
            return super().__call__(*args, **kwargs)
        return bind_to_lightning(cls, cls._root_to_bind())(*args, **kwargs)

    def _root_to_bind(cls) -> str:
        ambiguous = _explicit_namespace is None and all(root in sys.modules for root in ROOTS)
        return ROOTS[0] if ambiguous and cls.rebinds else namespace_in_use()

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, which ``__call__`` would hide."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getattr__(cls, name: str) -> Any:
        """Finds Lightning's own class attributes (``load_from_checkpoint``) on the real class."""
        absent = f"type object {cls.__name__!r} has no attribute {name!r}"
        if name.startswith("_") or cls.__dict__.get("lightning_root") is not None:
            raise AttributeError(absent)
        try:
            root = cls._root_to_bind()
        except ConfigError as error:
            raise AttributeError(f"{absent}: {error}") from error
        return getattr(bind_to_lightning(cls, root), name)


if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Callback
else:
    _Callback = object


class LateBoundCallback(_Callback, metaclass=LateBoundMeta):
    """Base of callbacks for either Lightning package."""

    lightning_base = "callbacks.Callback"


def bind_to_lightning(cls: Any, root: str | None, base: str | None = None) -> Any:
    """Returns the subclass of ``cls`` with its Lightning base, or ``base``, of ``root``."""
    cls = cls.__dict__.get("unbound_class", cls)
    key = (cls, root, base or cls.lightning_base)
    if key not in _bound_classes:
        module, _, name = key[2].rpartition(".")
        lightning_class = getattr(import_module(f"{root}.{module}"), name)
        body = {
            "lightning_root": root,
            "lightning_base": key[2],
            "lightning_class": lightning_class,
            "unbound_class": cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        _bound_classes[key] = type(cls)(cls.__name__, (cls, lightning_class), body)
    return _bound_classes[key]


def _reduce_class(cls: Any) -> Any:
    """Returns how pickle finds a class: one made at run time by what it was made of."""
    if cls.__dict__.get("lightning_root") is None:
        return cls.__qualname__
    return bind_to_lightning, (cls.unbound_class, cls.lightning_root, cls.lightning_base)


copyreg.pickle(LateBoundMeta, _reduce_class)


def bind_if_unambiguous(value: Any) -> Any:
    """Returns a class with its Lightning base where it is clear which, all else as it is.

    For LightningCLI, which checks the class before it makes an instance; where both packages are
    imported, the one whose LightningCLI is imported counts.
    """
    root = _explicit_namespace or _unambiguous(".trainer") or _unambiguous(".cli")
    late_bound = isinstance(value, LateBoundMeta)
    return bind_to_lightning(value, root) if late_bound and root is not None else value


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


def _reduce_mixed_class(cls: Any) -> Any:
    mixed_from = cls.__dict__.get("mixed_from")
    return cls.__qualname__ if mixed_from is None else (mixed_class, mixed_from)


copyreg.pickle(MixedClassMeta, _reduce_mixed_class)


def register() -> None:
    """Registers the strategies in every Lightning package, now or when it is imported."""
    for root in ROOTS:
        call_after_import(f"{root}.strategies", partial(_register, root))
    call_after_import(_WRITTEN, _accept_classes)


def _register(root: str, strategies: ModuleType) -> None:
    for name, (class_name, description) in _STRATEGIES.items():
        if name not in strategies.StrategyRegistry:
            strategies.StrategyRegistry.register(
                name, partial(_build_strategy, class_name, root), description=description
            )
    # Without importing the classes, which import the engine.
    if _WRITTEN in sys.modules:
        _accept_classes(sys.modules[_WRITTEN])


def _accept_classes(written: ModuleType) -> None:
    """Makes the classes subclasses of every imported Lightning's ``Strategy``.

    Lightning and LightningCLI check the class before an instance is bound to one of them.
    """
    for root in ROOTS:
        base = getattr(sys.modules.get(f"{root}.strategies"), "Strategy", None)
        for class_name, _ in _STRATEGIES.values():
            # Missing while the module is being imported, which calls again at its end.
            if base is not None and hasattr(written, class_name):
                base.register(getattr(written, class_name))


def _build_strategy(class_name: str, root: str, **arguments: Any) -> Any:
    written = getattr(import_module(_WRITTEN), class_name)
    return bind_to_lightning(written, root)(**arguments)

"""Momentum copies of adapted parts, such as teachers and target networks.

Such a copy is made by ``copy.deepcopy`` and updated by a loop over the ``parameters()`` of both.
Its adapters must start as the other side's and follow them; the frozen base is the same on both
sides and must not be averaged: packed 4-bit codes are not numbers. A copy that is made after the
injection, in ``on_fit_start``, has the adapters already and only has to follow.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.engine.adapters import adapted_layers, adapter_parameters
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.fingerprint import fingerprint
from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    add_mixin,
    remove_mixin,
    stored_parameter,
)
from lightning_peft.engine.record import MomentumCopy, Record, record_of, require_record
from lightning_peft.engine.selection.parts import inside
from lightning_peft.errors import LifecycleError

_PRODUCTS = (*LINEAR_LIKE, *CONVOLUTION_LIKE)
_WRITES = re.compile(
    r"can't be cast to the desired output type (Byte|Char)|not implemented for '(Byte|Char)'"
)

_UNFREEZES = re.compile(r"only Tensors of floating point .*dtype can require gradients")

_SHAPES = re.compile(r"The size of tensor a \(\d+\) must match the size of tensor b \(\d+\)")


class HidesFrozenParameters(DynamicMixin):
    """Mixin for modules of which one follows the other: ``parameters()`` leaves the base out.

    What remains lines up on both sides: adapters, heads, and whatever else trains. The names,
    ``named_parameters()`` and ``state_dict()``, stay complete.
    """

    frozen_names: frozenset[str]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the parameters besides the frozen base; all of them where there are no others."""
        named = dict(self.named_parameters(recurse=recurse))  # type: ignore[attr-defined]
        others = [param for name, param in named.items() if name not in self.frozen_names]
        yield from others or named.values()


def find_momentum_copies(module: nn.Module) -> list[MomentumCopy]:
    """Returns the submodules that are copies of each other, outermost first.

    Blocks that repeat in one list do not count: ``nn.TransformerEncoder`` makes them by copying.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, child in module.named_modules():
        shapes = _shapes(child)
        if name and shapes and any(isinstance(x, _PRODUCTS) for x in child.modules()):
            groups.setdefault((type(child), shapes, _sample(child)), []).append((name, child))
    momentum_copies: list[MomentumCopy] = []
    for members in groups.values():
        for index, (name, child) in enumerate(members):
            if _covered(name, momentum_copies):
                continue
            for other, candidate in members[index + 1 :]:
                if not _covered(other, momentum_copies) and _are_copies(
                    name, child, other, candidate
                ):
                    momentum_copies.append(_momentum_copy(name, child, other, candidate))
    return momentum_copies


def unregistered_copies(module: nn.Module) -> dict[str, str]:
    """Returns copies that ``module`` keeps in lists, tuples or dictionaries, unregistered.

    Nothing can be done to those: they have no name, and no checkpoint holds them.

    Returns:
        Where a copy is, such as ``"teachers[0]"``, and the name of the submodule it is a copy of.
    """
    known = {id(child) for child in module.modules()}
    found: dict[str, str] = {}
    for owner, child in module.named_modules():
        for attribute, value in vars(child).items():
            for key, kept in _modules_in(value):
                if id(kept) in known or attribute == "_modules":
                    continue
                origin = next(
                    (n for n, x in module.named_modules() if n and are_equal(x, kept)), None
                )
                if origin is not None:
                    found[f"{owner}.{attribute}[{key!r}]".lstrip(".")] = origin
    return found


def _modules_in(value: object) -> list[tuple[object, nn.Module]]:
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [(key, kept) for key, kept in items if isinstance(kept, nn.Module)]


def are_equal(child: nn.Module, kept: nn.Module) -> bool:
    """Whether two modules are of one class, and have the same parameters with the same values."""
    same = type(child) is type(kept) and () != _shapes(child) == _shapes(kept)
    return same and same_values(child, kept)


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    """Returns the shapes of the parameters; none where values are missing or in other classes.

    Lazy layers have none before the first batch; tensor classes of libraries cannot compare theirs.
    """
    named = list(module.named_parameters())
    others = any(is_lazy(param) or hasattr(param, "__tensor_flatten__") for _, param in named)
    return () if others else tuple((name, param.shape) for name, param in named)


def _sample(module: nn.Module) -> tuple[float, ...]:
    """Returns a few values that copies have in common, and hardly any other two modules."""
    wide = [p for p in nn.Module.parameters(module) if p.ndim > 1 and not p.is_meta]
    if not wide:
        return ()
    flat = wide[0].detach().reshape(-1)
    return tuple(flat[:2].tolist() + flat[-2:].tolist())


def _covered(name: str, momentum_copies: list[MomentumCopy]) -> bool:
    return any(inside(name, [pair.source, pair.copy]) for pair in momentum_copies)


def _momentum_copy(name: str, child: nn.Module, other: str, candidate: nn.Module) -> MomentumCopy:
    first, second = (
        not any(p.requires_grad for p in nn.Module.parameters(x)) for x in (child, candidate)
    )
    if first and not second:
        return MomentumCopy(other, name, True)
    return MomentumCopy(name, other, second)


def _are_copies(name: str, child: nn.Module, other: str, candidate: nn.Module) -> bool:
    if re.sub(r"\d+", "*", name) == re.sub(r"\d+", "*", other) or inside(other, [name]):
        return False
    return same_values(child, candidate)


def same_values(child: nn.Module, candidate: nn.Module) -> bool:
    """Whether two modules with parameters of the same names and shapes hold the same values."""
    mine, theirs = dict(child.named_parameters()), dict(candidate.named_parameters())
    return all(
        not a.is_meta and a is not theirs[key] and a.dtype == theirs[key].dtype
        and torch.equal(a, theirs[key].to(a.device))
        for key, a in mine.items()
    ) and any(_varies(a) for a in mine.values())  # fmt: skip


def _varies(param: torch.Tensor) -> bool:
    flat = param.detach().flatten()
    return param.ndim > 1 and bool((flat != flat[0]).any())


def link_copies(
    module: nn.Module, momentum_copies: list[MomentumCopy], frozen: set[str], adapter_name: str
) -> None:
    """Makes the adapters of every copy start as those it copies, and hides the base from loops."""
    for pair in momentum_copies:
        source, copy = (module.get_submodule(name) for name in (pair.source, pair.copy))
        theirs = adapter_parameters(source)
        with torch.no_grad():
            for name, param in adapter_parameters(copy).items():
                if name in theirs and adapter_name in name.split("."):
                    param.copy_(theirs[name])
        if pair.frozen:
            freeze_copy(module, pair)
    hide_frozen_base(module, momentum_copies, frozen)


def hide_frozen_base(
    module: nn.Module, momentum_copies: list[MomentumCopy], frozen: Collection[str]
) -> None:
    """Leaves the frozen base out of the ``parameters()`` of both sides, and of their wrappers."""
    for pair in momentum_copies:
        for root in (_with_wrappers(module, pair.source), _with_wrappers(module, pair.copy)):
            for name, child in module.get_submodule(root).named_modules():
                prefix = f"{root}.{name}." if name else f"{root}."
                own = (n.removeprefix(prefix) for n in frozen if n.startswith(prefix))
                if not isinstance(child, HidesFrozenParameters):
                    add_mixin(child, HidesFrozenParameters)
                child.frozen_names = frozenset(own)


def _with_wrappers(module: nn.Module, name: str) -> str:
    """Returns the outermost submodule that holds the one called ``name`` and nothing else.

    ``AveragedModel`` and other classes that keep an average hold the copy as their only submodule.
    """
    inner = {id(p) for p in nn.Module.parameters(module.get_submodule(name))}
    pieces = name.split(".")
    for count in range(1, len(pieces)):
        outer = ".".join(pieces[:count])
        if {id(p) for p in nn.Module.parameters(module.get_submodule(outer))} == inner:
            return outer
    return name


def freeze_copy(module: nn.Module, pair: MomentumCopy) -> None:
    """Stops gradients into the adapters of a copy: they follow, they do not train."""
    pair.frozen = True
    for layer in adapted_layers(module.get_submodule(pair.copy)).values():
        if isinstance(layer, AdapterLayer):
            layer.is_momentum_copy = True
            layer.train_adapters(())


def freeze_unoptimized_copies(module: nn.Module, held: set[int]) -> None:
    """Freezes copies that no optimizer holds while it holds what they copy."""
    for pair in require_record(module).momentum_copies:
        source, copy = (
            [p for p in adapter_parameters(module.get_submodule(name)).values() if p.requires_grad]
            for name in (pair.source, pair.copy)
        )
        if copy and {id(p) for p in source} <= held and not {id(p) for p in copy} & held:
            freeze_copy(module, pair)


def unlink_copies(module: nn.Module, momentum_copies: list[MomentumCopy]) -> None:
    """Undoes :func:`link_copies`."""
    for pair in momentum_copies:
        for name in (pair.source, pair.copy):
            for child in module.get_submodule(_with_wrappers(module, name)).modules():
                if isinstance(child, HidesFrozenParameters):
                    remove_mixin(child, HidesFrozenParameters)
                    del child.frozen_names


def frozen_names(record: Record, pair: MomentumCopy) -> set[str]:
    """Returns the names of the frozen weights of a copy: those of what it copies, below it."""
    leading = [name for name in record.frozen if inside(name, [pair.source])]
    return {pair.copy + name.removeprefix(pair.source) for name in leading}


def check_momentum_copies(module: nn.Module) -> None:
    """Compares the frozen base of every copy with what it was at the first call."""
    record = require_record(module)
    for pair in record.momentum_copies:
        names = sorted(frozen_names(record, pair))
        owners = [(name, *name.rpartition(".")[::2]) for name in names]
        stored = [(n, stored_parameter(module.get_submodule(o), leaf)) for n, o, leaf in owners]
        codes = [(n, p) for n, p in stored if not p.is_floating_point()]
        now = tuple(fingerprint(codes).sums)
        pair.base = now if pair.base is None else pair.base
        if now != pair.base:
            raise LifecycleError(
                f"{pair.copy!r} follows {pair.source!r}, and the update wrote into its "
                f"quantized weights, such as {codes[0][0]!r}: averages of 4-bit codes are no "
                "weights. Update over `parameters()`, which leaves the frozen base out, instead "
                "of over `state_dict()` or `named_parameters()`; or use LoRAStrategy."
            )


def link_late_copies(module: nn.Module) -> list[MomentumCopy]:
    """Makes copies follow that ``module`` made of its adapted parts after the injection.

    Their adapters do not train: no optimizer holds them, since the optimizers are older.

    Returns:
        What was found, and is in the record now.
    """
    record = require_record(module)
    known = {module.get_submodule(name) for name in _targets(record)}
    late = {
        name
        for name, child in module.named_modules()
        if isinstance(child, AdapterLayer) and child not in known
    }
    momentum_copies: list[MomentumCopy] = []
    for name, child in module.named_modules() if late else ():
        layers = {n for n in late if inside(n, [name])}
        if not name or not layers or inside(name, [pair.copy for pair in momentum_copies]):
            continue
        source = _copied(module, child, known)
        if source is not None:
            momentum_copies.append(MomentumCopy(source, name, True))
    for pair in momentum_copies:
        freeze_copy(module, pair)
    hide_frozen_base(
        module,
        momentum_copies,
        record.frozen.union(*(frozen_names(record, pair) for pair in momentum_copies)),
    )
    record.momentum_copies += momentum_copies
    if momentum_copies:
        check_momentum_copies(module)
    return momentum_copies


def _targets(record: Record) -> set[str]:
    return {
        part.qualified(target)
        for part in record.parts.values()
        for info in part.adapters.values()
        if info.in_place
        for target in info.targets
    }


def _copied(module: nn.Module, child: nn.Module, known: set[nn.Module]) -> str | None:
    """Returns the name of the module that ``child`` is a copy of."""
    for name, other in module.named_modules():
        adapted = not known.isdisjoint(other.modules())
        if name and other is not child and adapted and are_equal(other, child):
            return name
    return None


def _in_hook(error: BaseException, callers: Collection[str]) -> bool:
    """Whether an error comes out of a hook that called no module."""
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name in frames for name in callers) and "_call_impl" not in frames


def _names_codes(text: str, layer: QuantizedLayer) -> bool:
    """Whether torch's error is one of writing to stored weights quantized as that of ``layer``."""
    _, _, keys = text.partition("Unexpected key(s) in state_dict: ")
    named = {name for key in layer.quantization_keys() for name in (f'.{key}"', f'"{key}"')}
    return bool(_WRITES.search(text)) or any(name in keys for name in named)


def explain_hook_error(
    module: nn.Module, error: Exception, callers: Collection[str]
) -> LifecycleError | None:
    """Explains an error of a hook that averages weights; ``None`` for other errors."""
    if record_of(module) is None:
        return None
    text = str(error)
    quantized = ((n, x) for n, x in module.named_modules() if isinstance(x, QuantizedLayer))
    name, layer = next(quantized, ("", None))
    if isinstance(error, RuntimeError) and layer is not None and _names_codes(text, layer):
        return LifecycleError(
            f"A hook computes with stored weights that are quantized, such as those of "
            f"{name!r}: packed codes cannot be averaged, and load into layers alike only. "
            "The frozen base does not change, so average what trains: loop over `parameters()` "
            "of a copy that the module holds, which leaves the base out, or over "
            "`named_parameters()` with `if p.requires_grad`; or use LoRAStrategy. torch reports: "
            f"{text.splitlines()[0]}"
        )
    if isinstance(error, RuntimeError) and layer is not None and _UNFREEZES.match(text):
        return LifecycleError(
            f"A hook unfreezes weights that are quantized, such as those of {name!r}, by "
            "requires_grad or unfreeze(). The base stays frozen: leave out what requires_grad_ "
            "cannot train, as by `if 'lora_' in name` over `named_parameters()`, let "
            "BackboneFinetuning unfreeze adapters in stages, or name the layers to train in full "
            "in `modules_to_save`."
        )
    unexpected = text.partition("Unexpected key(s) in state_dict: ")[2]
    kinds = {kind for x in adapted_layers(module).values() for kind in x.adapter_layer_names}
    if isinstance(error, RuntimeError) and any(f".{kind}." in unexpected for kind in kinds):
        return LifecycleError(
            "A hook loads the state of adapted layers into layers without adapters. Make the copy "
            "by copy.deepcopy, or before the adapters are added (in `__init__` or `setup`). torch "
            f"reports: {text[:200]}"
        )
    if isinstance(error, RuntimeError) and _SHAPES.search(text) and _in_hook(error, callers):
        return LifecycleError(
            "A hook computes with tensors whose shapes differ. If it goes through `parameters()` "
            "and through tensors that were kept before the adapters were added, such as the "
            "averages of an EMA in `__init__`, these do not line up: keep them in `on_fit_start`, "
            f"when the adapters are there. torch reports: {text.splitlines()[0]}"
        )
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if isinstance(key, str) and key in adapter_parameters(module):
        return LifecycleError(
            f"A hook looks up {key!r} in a dictionary that does not have it. It was probably made "
            "before the adapters were added, such as the averages of an EMA in `__init__`. Make it "
            "in `on_fit_start`, when the adapters are there."
        )
    return None

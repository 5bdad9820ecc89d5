"""Selection of the submodules that get adapters.

With nothing asked for, the pretrained parts are adapted: the outermost transformers, timm or
diffusers models. A module without any is one part as a whole. Metrics and losses are left alone,
and so is what the module froze itself while other layers of it train: teachers, networks inside of
a loss, autoencoders, towers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_peft.compat.torch import Loss
from lightning_peft.engine.record import MomentumCopy
from lightning_peft.engine.selection.parts import (
    NO_EXCLUSIONS,
    PRODUCTS,
    Exclusions,
    base_modules,
    has_product,
    inside,
    is_pretrained,
    matches_suffix,
)
from lightning_peft.errors import TargetModulesError, itemize, similar_names

METRIC = "a metric"
LOSS = "a loss"
FROZEN = "frozen by the module"

_LOSS_CLASSES = re.compile(r"(Loss|Losses|Criterion|LPIPS)$")
_LOSS_NAMES = re.compile(r"(.*_)?(loss|losses|criterion|criteria|lpips|loss_(fn|func|function))$")
# Where all pretrained weights are frozen, what the rest is called says which of two it is: layers
# on top of a network that is to be adapted, or a network that trains by help of another one.
_HEADS = re.compile(
    "adapter|classifier|cls|fc|heads?|linear|logits|mlp|neck|out|output|pooler|predictor|probe|proj"
    "|projection|projector|regressor|score"
)
_TRAINED = re.compile("actor|denoiser|diffusion|generator|policy|student|unet")
_REFERENCES = re.compile(
    "ema|frozen|lpips|momentum|perceptual|ref|reference|reward|target|teacher|vae"
)


@dataclass
class Selection:
    """What is adapted and what is not.

    Attributes:
        parts: The submodules to adapt by their dotted names; ``""`` is the module itself.
        left: Names of the submodules that stay as they are, with the reason.
        exclusions: The same as sets of modules, as the search for layers takes them.
    """

    parts: dict[str, nn.Module]
    left: dict[str, str] = field(default_factory=dict)
    exclusions: Exclusions = NO_EXCLUSIONS


def find_parts(module: nn.Module, adapt: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Returns the submodules to adapt by their dotted names; ``""`` is ``module`` itself."""
    return select(module, adapt).parts


def select(
    module: nn.Module,
    adapt: str | Iterable[str] | None = None,
    wanted: str | Iterable[str] | None = None,
    momentum_copies: Collection[MomentumCopy] = (),
) -> Selection:
    """Decides which submodules are adapted and which are left as they are; changes nothing.

    Args:
        module: The user's module, before anything was done to it.
        adapt: Names of the submodules to adapt; ``None`` looks for pretrained parts. What is named
            is adapted, whatever it is.
        wanted: ``target_modules``. What it names is adapted although it is frozen.
        momentum_copies: Copies, which follow what they copy although they are frozen.
    """
    parts = None if adapt is None else _named_parts(module, adapt)
    left = _metrics_and_losses(module, parts or {})
    copies = _momentum_copies(module, momentum_copies)
    if parts is None:
        parts, frozen = _pretrained_parts(module, left, copies, wanted)
        left |= frozen
        # Frozen networks outside of pretrained models, to which nothing happens.
        skip = {module.get_submodule(name) for name in left}
        left |= dict.fromkeys(_frozen_networks(module, skip, {*copies, *parts.values()}), FROZEN)
    on_top: set[nn.Module] = set()
    for name, part in parts.items():
        if not is_pretrained(part):
            frozen, new_heads = _left_inside(module, name, left, copies, wanted)
            left |= frozen
            on_top |= new_heads
    left = {n: why for n, why in left.items() if not inside(n, [up for up in left if up != n])}
    find = module.get_submodule
    pairs = tuple((find(pair.source), find(pair.copy)) for pair in momentum_copies)
    apart, unused = left_modules(module, left), unused_modules(module)
    return Selection(parts, left, Exclusions(apart, frozenset(on_top), pairs, unused))


def unused_modules(module: nn.Module) -> frozenset[nn.Module]:
    """Returns the submodules of which ``module`` says that its outputs do not depend on them.

    It names them in ``unused_modules``. No adapter in there would get a gradient.
    """
    names: Iterable[str] = getattr(module, "unused_modules", ())
    return frozenset(child for name in names for child in module.get_submodule(name).modules())


def left_modules(module: nn.Module, names: Iterable[str]) -> frozenset[nn.Module]:
    """Returns the modules below ``names`` that ``module`` does not hold anywhere else."""
    roots = {module.get_submodule(name) for name in names}
    below = {child for root in roots for child in root.modules()}
    return frozenset(below - {child for _, child in _walk(module, roots)})


def left_parameters(module: nn.Module, left: Collection[nn.Module]) -> frozenset[int]:
    """Returns the ids of the parameters that only modules in ``left`` hold."""
    mine, others = (
        {
            id(param)
            for child in module.modules()
            if (child in left) is within
            for param in child._parameters.values()
            if param is not None
        }
        for within in (True, False)
    )
    return frozenset(mine - others)


def _walk(module: nn.Module, stop: Collection[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields every submodule once with a name, without ``stop`` and what only that holds."""
    seen: set[nn.Module] = set()

    def walk(name: str, child: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if child in seen or child in stop:
            return
        seen.add(child)
        yield name, child
        for last, below in child._modules.items():
            if below is not None:
                yield from walk(f"{name}.{last}".lstrip("."), below)

    return walk("", module)


def _named_parts(module: nn.Module, adapt: str | Iterable[str]) -> dict[str, nn.Module]:
    names = [adapt] if isinstance(adapt, str) else list(adapt)
    known = dict(module.named_modules(remove_duplicate=False))
    problems = [] if names else ["it names no submodule; leave it out for the pretrained parts"]
    for name in names:
        if name not in known:
            hint = similar_names(name, known)
            problems.append(f"adapt={name!r} is not a submodule of {type(module).__name__}{hint}")
        problems += [
            f"adapt={name!r} lies inside {other!r}, which is adapted as a whole"
            for other in names
            if other != name and inside(name, [other])
        ]
    if problems:
        raise TargetModulesError("`adapt` does not fit the module:" + itemize(problems))
    return {name: known[name] for name in names}


def _metrics_and_losses(module: nn.Module, named: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the outermost metrics and losses; not what holds all there is to adapt."""
    asked = set(named.values())
    found: dict[str, str] = {}
    for name, child in module.named_modules():
        if not name or child in asked or inside(name, found) or _holds(child, asked):
            continue
        reason = METRIC if _is_metric(child) else LOSS if _is_loss(name, child) else None
        if reason and not any(is_pretrained(module.get_submodule(up)) for up in _above(name)):
            found[name] = reason
    rest = _walk(module, {module.get_submodule(name) for name in found})
    if any(isinstance(child, PRODUCTS) for _, child in rest):
        return found
    # A loss that the whole model was given to.
    return {name: reason for name, reason in found.items() if reason == METRIC}


def _holds(child: nn.Module, others: Collection[nn.Module]) -> bool:
    return any(below in others for below in child.modules())


def _above(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces))]


def _is_metric(child: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(child).__mro__)


def _is_loss(name: str, child: nn.Module) -> bool:
    named = _LOSS_NAMES.match(name.rpartition(".")[2]) and not isinstance(child, PRODUCTS)
    classes = (_LOSS_CLASSES.search(cls.__name__) for cls in type(child).__mro__)
    return isinstance(child, Loss) or bool(named) or any(classes)


def _momentum_copies(
    module: nn.Module, momentum_copies: Collection[MomentumCopy]
) -> set[nn.Module]:
    """Returns the copies of what trains, which follow it."""
    return {
        module.get_submodule(pair.copy)
        for pair in momentum_copies
        if not is_frozen(module.get_submodule(pair.source))
    }


def is_frozen(module: nn.Module) -> bool:
    """Whether ``module`` has weights and none of them trains.

    Packed weights, which never do, say nothing.
    """
    floats = [p for p in nn.Module.parameters(module) if p.is_floating_point()]
    return bool(floats) and not any(p.requires_grad for p in floats)


def _pretrained_parts(
    module: nn.Module,
    left: Mapping[str, str],
    copies: Collection[nn.Module],
    wanted: str | Iterable[str] | None,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the pretrained models to adapt, and those that are left."""
    models: dict[str, nn.Module] = {}
    for name, child in _walk(module, {module.get_submodule(name) for name in left}):
        if is_pretrained(child) and not inside(name, models):
            models[name] = child
    following = {below for copy in copies for below in copy.modules()}
    frozen = [
        name
        for name, model in models.items()
        if is_frozen(model)
        and model not in following
        and not _names_explicitly(wanted, name, module)
    ]
    if len(frozen) == len(models):
        # All of it: adapted, unless what it is called or what trains says that it is another's.
        skip = {module.get_submodule(name) for name in [*left, *models]}
        free = _free_networks(module, skip)
        trained = any(_has_word(name, _TRAINED) for name in free)
        frozen = [n for n in frozen if trained or (free and _has_word(n, _REFERENCES))]
    parts = {name: model for name, model in models.items() if name not in frozen}
    return parts or {"": module}, dict.fromkeys(frozen, FROZEN)


def _left_inside(
    module: nn.Module,
    name: str,
    left: Mapping[str, str],
    copies: Collection[nn.Module],
    wanted: str | Iterable[str] | None,
) -> tuple[dict[str, str], set[nn.Module]]:
    """Returns the layers left out of a part without a pretrained root, and those on top.

    That is: names of frozen submodules that stay as they are, and trained layers that are heads of
    the frozen ones, where those are adapted.
    """
    part = module.get_submodule(name)
    skip = {module.get_submodule(other) for other in left}
    frozen = {
        below: child
        for below, child in _frozen_networks(part, skip, copies).items()
        if not _names_explicitly(wanted, below, part)
    }
    if not frozen or "" in frozen:
        return {}, set()
    free = _free_networks(part, {*skip, *frozen.values(), *copies})
    networks = [below for below in free if not _is_on_top(below, free)]
    if not networks and all(_has_word(below.rpartition(".")[2], _HEADS) for below in frozen):
        # Then names say nothing: the last one is the head.
        networks = list(free)[:-1]
    chosen = [n for n in frozen if networks or (free and _has_word(n, _REFERENCES))]
    on_top = {free[below] for below in free} if len(chosen) < len(frozen) else set()
    return {f"{name}.{below}".lstrip("."): FROZEN for below in chosen}, on_top


def _is_on_top(name: str, free: Mapping[str, nn.Module]) -> bool:
    """Whether a network that trains is a head of what is frozen, by its name."""
    if _has_word(name, _TRAINED):
        return False
    alone = len(free) == 1 and isinstance(free[name], PRODUCTS)
    return alone or _has_word(name.rpartition(".")[2], _HEADS)


def _has_word(name: str, words: re.Pattern[str]) -> bool:
    return any(words.fullmatch(word) for word in re.findall(r"[a-z]+", name.lower()))


def _frozen_networks(
    part: nn.Module, skip: Collection[nn.Module], copies: Collection[nn.Module]
) -> dict[str, nn.Module]:
    """Returns the outermost submodules with linear layers or convolutions that are all frozen.

    Without ``skip`` and ``copies``, and without what holds one of ``copies``.
    """
    found: dict[str, nn.Module] = {}
    for name, child in _walk(part, {*skip, *copies}):
        if inside(name, found) or any(is_pretrained(part.get_submodule(up)) for up in _above(name)):
            continue
        if is_frozen(child) and has_product(child) and not _holds(child, copies):
            found[name] = child
    return found


def _free_networks(part: nn.Module, skip: Collection[nn.Module]) -> dict[str, nn.Module]:
    """Returns the outermost submodules with layers that train, without any of ``skip`` inside."""
    found: dict[str, nn.Module] = {}
    for name, child in _walk(part, skip):
        if name and not inside(name, found) and not _holds(child, skip) and _trains(child):
            found[name] = child
    return found


def _trains(network: nn.Module) -> bool:
    return any(
        isinstance(child, PRODUCTS) and any(p.requires_grad for p in child.parameters())
        for child in network.modules()
    )


def _names_explicitly(wanted: str | Iterable[str] | None, root: str, part: nn.Module) -> bool:
    """Whether ``target_modules`` means a frozen submodule in particular.

    It does if an entry has the name of the submodule, or matches layers nowhere else.
    """
    if wanted is None or not root:
        return False
    last = root.rpartition(".")[2]
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(last)}(?![A-Za-z0-9_])")
    patterns = [wanted] if isinstance(wanted, str) else list(wanted)
    if not last.isdigit() and any(word.search(pattern) for pattern in patterns):
        return True
    layers = [name for name in base_modules(part) if name]
    matched = ([n for n in layers if _matches(wanted, pattern, n)] for pattern in patterns)
    return any(names and all(inside(n, [root]) for n in names) for names in matched)


def _matches(wanted: str | Iterable[str], pattern: str, name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(pattern, name) is not None
    return matches_suffix(pattern, name)

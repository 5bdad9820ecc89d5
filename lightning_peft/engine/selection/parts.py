"""Roles of layers in an adapted part: heads, tied layers, output embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.engine.layers.adapter import AdapterLayer
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE

PRODUCTS = (*LINEAR_LIKE, *CONVOLUTION_LIKE)
HEAD_NAMES = frozenset({"classifier", "fc", "head", "heads", "lm_head", "output_layer", "score"})


@dataclass(frozen=True)
class Exclusions:
    """Submodules among which no layers to adapt are looked for.

    Attributes:
        left: Those that stay as they are; no heads either.
        new_heads: The roots of those that train on top of a frozen part: heads, whatever they are
            called.
        copies: Pairs of a submodule and its copy: what is a head of one is a head of the other.
        unused: Those that get no adapter unless they are named; part of the base like any other.
    """

    left: frozenset[nn.Module] = frozenset()
    new_heads: frozenset[nn.Module] = frozenset()
    copies: tuple[tuple[nn.Module, nn.Module], ...] = ()
    unused: frozenset[nn.Module] = frozenset()


NO_EXCLUSIONS = Exclusions()


def matches_suffix(entry: str, name: str) -> bool:
    """Whether ``entry`` is ``name`` or its last steps."""
    return f".{name}".endswith(f".{entry}")


def inside(name: str, owners: Iterable[str]) -> bool:
    """Whether the dotted ``name`` is one of ``owners`` or lies in one of them."""
    return any(owner in ("", name) or name.startswith(f"{owner}.") for owner in owners)


def base_modules(part: nn.Module) -> dict[str, nn.Module]:
    """Returns the submodules of ``part`` by name, ``part`` first, without those of adapters."""
    found: dict[str, nn.Module] = {}
    own: list[str] = []
    for name, child in part.named_modules():
        if inside(name, own):
            continue
        found[name] = child
        if isinstance(child, AdapterLayer):
            kinds = (*child.adapter_layer_names, *child.adapter_module_names)
            own += [f"{name}.{kind}".lstrip(".") for kind in kinds]
    return found


def parameter_holders(part: nn.Module) -> dict[int, list[str]]:
    """Returns, by the id of each parameter, the names of the submodules that hold it.

    A layer registered under two names counts once: it is one holder.
    """
    holders: dict[int, list[str]] = {}
    for name, child in part.named_modules():
        for param in child._parameters.values():
            if param is not None:
                holders.setdefault(id(param), []).append(name)
    return holders


def parameter_names(part: nn.Module) -> dict[int, list[str]]:
    """Returns, by the id of each parameter, all its names in ``part``."""
    names: dict[int, list[str]] = {}
    for name, param in part.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return names


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a model of transformers, timm or diffusers."""
    return isinstance(module, PreTrainedModel) or _comes_from(module, "timm", "diffusers")


def _comes_from(module: nn.Module, *libraries: str) -> bool:
    marks = {"timm": "pretrained_cfg", "diffusers": "save_pretrained"}
    return any(
        cls.__module__.partition(".")[0] == library and hasattr(module, marks[library])
        for library in libraries
        for cls in type(module).__mro__
    )


def output_embeddings(part: nn.Module) -> nn.Module | None:
    """Returns the layer that maps to the vocabulary, which is pretrained and stays frozen."""
    if not isinstance(part, PreTrainedModel):
        return None
    layer: nn.Module | None = part.get_output_embeddings()
    return layer


def find_heads(part: nn.Module, exclusions: Exclusions = NO_EXCLUSIONS) -> dict[str, nn.Module]:
    """Returns the output heads of a part, by name: they stay exactly as the user left them.

    For a transformers model these are the submodules outside of its base model, except those with
    the output embeddings; for a timm model its classifiers; for one of diffusers, which is
    pretrained up to its output, none. In any other module, layers outside of repeated blocks that
    are called ``head``, ``classifier``, ``fc`` and the like, and else the last linear layer or
    convolution registered. Blocks repeat in a list or, where an ``fc`` is concerned, in three or
    more modules of one class. A layer that shares its weight with another one is not a head: it is
    as pretrained as that one.
    """
    if isinstance(part, PreTrainedModel):
        return _transformers_heads(part)
    if _comes_from(part, "diffusers"):
        return {}
    modules = {n: child for n, child in base_modules(part).items() if child not in exclusions.left}
    get_classifier: Any = getattr(part, "get_classifier", None)
    if get_classifier is not None:
        given = get_classifier()
        # DeiT has two: one of them learns from a teacher.
        classifiers = given if isinstance(given, (tuple, list)) else [given]
        return {n: child for n, child in modules.items() if any(child is c for c in classifiers)}
    named: dict[str, nn.Module] = {}
    for name, child in modules.items():
        called = _is_called_head(name) and has_product(child)
        if (called or child in exclusions.new_heads) and not inside(name, named):
            named[name] = child
    blocks = _in_equal_blocks(named, modules)
    named = {name: child for name, child in named.items() if name not in blocks} or named
    copied = {child for _, copy in exclusions.copies for child in copy.modules()}
    products = [name for name, child in modules.items() if isinstance(child, PRODUCTS)]
    last = [name for name in products if modules[name] not in copied][-1:]
    shared = set(tied_layers(part))
    heads = named or _with_copies({name for name in last if name}, modules, exclusions)
    return {n: child for n, child in heads.items() if not any(inside(tied, [n]) for tied in shared)}


def _with_copies(
    names: set[str], modules: Mapping[str, nn.Module], exclusions: Exclusions
) -> dict[str, nn.Module]:
    """Returns the modules of ``names``, and what corresponds to them in copies."""
    heads = {modules[name] for name in names}
    for origin, copy in exclusions.copies:
        pairs = zip(origin.modules(), copy.modules(), strict=True)
        heads |= {copy for source, copy in pairs if source in heads}
    return {name: child for name, child in modules.items() if child in heads}


def _is_called_head(name: str) -> bool:
    *above, last = name.split(".")
    return last in HEAD_NAMES and not any(step.isdigit() for step in above)


def _in_equal_blocks(names: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """Returns those of ``names`` that belong to blocks of one class, as each gate has its ``fc``.

    Two of a class are a model and its momentum copy, each with a head; only more are blocks. Other
    names are never used inside of blocks: three decoders with a ``head`` each are three tasks.
    """
    inner = [name for name in names if name.rpartition(".")[2] == "fc"]
    owners = {name: type(modules[name.rpartition(".")[0]]) for name in inner}
    counts = Counter(owners.values())
    return {name for name in inner if counts[owners[name]] > 2}


def tied_layers(part: nn.Module) -> list[str]:
    """Returns the names of linear layers that share their weight with a layer of another kind.

    Those are output layers tied to an embedding.
    """
    modules, holders = base_modules(part), parameter_holders(part)
    return [
        name
        for name, child in modules.items()
        if isinstance(child, LINEAR_LIKE)
        and any(
            not isinstance(modules[holder], LINEAR_LIKE)
            for holder in holders.get(id(child._parameters.get("weight")), [])
        )
    ]


def has_product(module: nn.Module) -> bool:
    """Whether a linear layer or convolution is in ``module``."""
    return any(isinstance(child, PRODUCTS) for child in module.modules())


def _transformers_heads(part: PreTrainedModel) -> dict[str, nn.Module]:
    base = part.base_model
    if base is part:
        return {}
    output, shared = output_embeddings(part), tied_layers(part)
    return {
        name: child
        for name, child in part.named_children()
        if child is not base
        and not any(inside(tied, [name]) for tied in shared)
        and child is not output
        # A head that holds the output embeddings, such as BERT's for masked words, is pretrained.
        and not {base, output} & set(child.modules())
        and any(True for _ in child.parameters())
    }

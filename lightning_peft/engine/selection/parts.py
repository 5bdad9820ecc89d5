"""Which submodules get adapters, and which of their layers are heads.

With nothing said, the pretrained parts are adapted: the outermost transformers or timm models.
A module without any is one part as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, LINEAR_LIKE
from lightning_peft.engine.layers.lora import LoraLayer
from lightning_peft.errors import TargetModulesError, itemize, near_names

_PRODUCTS = (*LINEAR_LIKE, *CONVOLUTION_LIKE)
HEAD_NAMES = frozenset({"classifier", "fc", "head", "heads", "lm_head", "output_layer", "score"})


def inside(name: str, owners: Iterable[str]) -> bool:
    """Says whether the dotted ``name`` is one of ``owners`` or lies in one of them."""
    return any(owner in ("", name) or name.startswith(f"{owner}.") for owner in owners)


def base_modules(part: nn.Module) -> dict[str, nn.Module]:
    """Returns the submodules of ``part`` by name, ``part`` first, without those of adapters."""
    found: dict[str, nn.Module] = {}
    own: list[str] = []
    for name, child in part.named_modules():
        if inside(name, own):
            continue
        found[name] = child
        if isinstance(child, LoraLayer):
            kinds = (*child.factor_names, "lora_dropout")
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


def find_parts(module: nn.Module, adapt: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Returns the submodules to adapt by their dotted names; ``""`` is ``module`` itself.

    Args:
        module: The user's module.
        adapt: Names of submodules; ``None`` looks for pretrained parts.

    Raises:
        TargetModulesError: If a name in ``adapt`` is no submodule, or lies inside another one.
    """
    return _named_parts(module, adapt) if adapt is not None else _pretrained_parts(module)


def _named_parts(module: nn.Module, adapt: str | Iterable[str]) -> dict[str, nn.Module]:
    names = [adapt] if isinstance(adapt, str) else list(adapt)
    known = dict(module.named_modules(remove_duplicate=False))
    problems = [] if names else ["it names no submodule; leave it out for the pretrained parts"]
    for name in names:
        if name not in known:
            hint = near_names(name, known)
            problems.append(f"adapt={name!r} is no submodule of {type(module).__name__}{hint}")
        problems += [
            f"adapt={name!r} lies inside {other!r}, which is adapted as a whole"
            for other in names
            if other != name and inside(name, [other])
        ]
    if problems:
        raise TargetModulesError("`adapt` does not fit the module:" + itemize(problems))
    return {name: known[name] for name in names}


def _pretrained_parts(module: nn.Module) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        if _is_pretrained(child) and not inside(name, parts):
            parts[name] = child
    return parts or {"": module}


def _is_pretrained(module: nn.Module) -> bool:
    timm = type(module).__module__.startswith("timm.") and hasattr(module, "pretrained_cfg")
    return timm or isinstance(module, PreTrainedModel)


def output_embeddings(part: nn.Module) -> nn.Module | None:
    """Returns the layer that maps to the vocabulary, which is pretrained and stays frozen."""
    if not isinstance(part, PreTrainedModel):
        return None
    layer: nn.Module | None = part.get_output_embeddings()
    return layer


def find_heads(part: nn.Module) -> dict[str, nn.Module]:
    """Returns the output heads of a part, by name: they stay exactly as the user left them.

    For a transformers model these are the submodules beside its base model, except those with the
    output embeddings; for a timm model its classifier. In any other module, layers outside of
    repeated blocks that are called ``head``, ``classifier``, ``fc`` and the like, and else the
    last linear layer or convolution registered. Blocks repeat in a list or, where an ``fc`` is
    concerned, in three or more modules of one class. A layer that shares its weight with another
    one is no head: it is as pretrained as that one.
    """
    if isinstance(part, PreTrainedModel):
        return _transformers_heads(part)
    modules = base_modules(part)
    get_classifier: Any = getattr(part, "get_classifier", None)
    if get_classifier is not None:
        classifier = get_classifier()
        return {name: child for name, child in modules.items() if child is classifier}
    named: dict[str, nn.Module] = {}
    for name, child in modules.items():
        if _is_called_head(name) and _has_product(child) and not inside(name, named):
            named[name] = child
    blocks = _in_equal_blocks(named, modules)
    named = {name: child for name, child in named.items() if name not in blocks} or named
    last = [(name, child) for name, child in modules.items() if isinstance(child, _PRODUCTS)][-1:]
    shared = set(tied_layers(part))
    heads = named or {name: child for name, child in last if name}
    return {n: child for n, child in heads.items() if not any(inside(tied, [n]) for tied in shared)}


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


def _has_product(module: nn.Module) -> bool:
    return any(isinstance(child, _PRODUCTS) for child in module.modules())


def _transformers_heads(part: PreTrainedModel) -> dict[str, nn.Module]:
    base = part.base_model
    if base is part:
        return {}
    output = output_embeddings(part)
    return {
        name: child
        for name, child in part.named_children()
        if child is not base
        and child is not output
        # A head that holds the output embeddings, such as BERT's for masked words, is pretrained.
        and not {base, output} & set(child.modules())
        and any(True for _ in child.parameters())
    }

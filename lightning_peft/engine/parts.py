"""Which submodules get adapters, and which of their layers are heads.

With nothing said, the pretrained parts are adapted: the outermost transformers or timm models.
A module without any is one part as a whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_peft.errors import LifecycleError, TargetModulesError, itemize

LINEAR_LIKE = (nn.Linear, Conv1D)
HEAD_NAMES = frozenset({"classifier", "fc", "head", "heads", "lm_head", "output_layer", "score"})


def find_parts(module: nn.Module, adapt: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Returns the submodules to adapt by their dotted names; ``""`` is ``module`` itself.

    Args:
        module: The user's module.
        adapt: Names of submodules; ``None`` looks for pretrained parts.

    Raises:
        TargetModulesError: If a name in ``adapt`` is no submodule, or lies inside another one.
        LifecycleError: If PEFT wrapped a part before.
    """
    parts = _named_parts(module, adapt) if adapt is not None else _pretrained_parts(module)
    wrapped = [
        f"{name or type(module).__name__}.{inner}".rstrip(".")
        for name, part in parts.items()
        for inner, child in part.named_modules()
        if isinstance(child, BaseTunerLayer)
    ]
    if wrapped:
        raise LifecycleError(
            "PEFT already put adapters on these layers:"
            + itemize(wrapped, 5)
            + "\nAdapters on adapters would train something else than either. Give the strategy "
            "the model without get_peft_model, and the same config as `peft_config`."
        )
    return parts


def _named_parts(module: nn.Module, adapt: str | Iterable[str]) -> dict[str, nn.Module]:
    names = [adapt] if isinstance(adapt, str) else list(adapt)
    known = dict(module.named_modules(remove_duplicate=False))
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
            hint = f"; near names: {', '.join(near)}" if near else ""
            problems.append(f"adapt={name!r} is no submodule of {type(module).__name__}{hint}")
        problems.extend(
            f"adapt={name!r} lies inside {other!r}, which is adapted as a whole"
            for other in names
            if other != name and (other == "" or name.startswith(f"{other}."))
        )
    if problems:
        raise TargetModulesError("`adapt` does not fit the module:" + itemize(problems))
    return {name: known[name] for name in names}


def _pretrained_parts(module: nn.Module) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        inside = any(other == "" or name.startswith(f"{other}.") for other in parts)
        if not inside and _is_pretrained(child):
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

    For a transformers model these are the submodules beside its base model, except the output
    embeddings; for a timm model its classifier. In any other module, layers that are called
    ``head``, ``classifier``, ``fc`` and the like, and else the last linear layer registered.
    """
    if isinstance(part, PreTrainedModel):
        return _transformers_heads(part)
    if hasattr(part, "get_classifier"):
        classifier = part.get_classifier()
        return {name: child for name, child in part.named_modules() if child is classifier}
    named = {
        name: child
        for name, child in part.named_modules()
        if name.rpartition(".")[2] in HEAD_NAMES and _has_linear(child)
    }
    outermost = {
        name: child
        for name, child in named.items()
        if not any(name.startswith(f"{other}.") for other in named)
    }
    linear = [
        (name, child) for name, child in part.named_modules() if isinstance(child, LINEAR_LIKE)
    ]
    return outermost or dict(linear[-1:])


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, LINEAR_LIKE) for child in module.modules())


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
        and base not in child.modules()
        and any(True for _ in child.parameters())
    }

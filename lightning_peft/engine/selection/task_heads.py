"""The heads that PEFT trains in full where a config names a task."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig
from torch import nn

from lightning_peft.engine.primitives import to_primitives
from lightning_peft.engine.selection.parts import base_modules

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_task_heads(config: PeftConfig, module: nn.Module) -> PeftConfig:
    """Returns ``config`` with the heads of its ``task_type`` in ``modules_to_save``, as PEFT does.

    Args:
        config: Any PEFT config; it is not changed.
        module: The module. Heads that it does not have are left out, which PEFT names too.
    """
    task = str(to_primitives(config.task_type))
    if task not in _HEADS or not hasattr(config, "modules_to_save"):
        return config
    there = {name.rpartition(".")[2] for name in base_modules(module)}
    named = list(config.modules_to_save or [])
    added = [head for head in _HEADS[task] if head in there and head not in named]
    if not added:
        return config
    extended: Any = copy.copy(config)
    extended.modules_to_save = [*named, *added]
    with_heads: PeftConfig = extended
    return with_heads

"""The reference of preference tuning: the same model with its adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_peft import engine
from lightning_peft.errors import ConfigError, itemize


@contextmanager
def reference(task: Any) -> Iterator[None]:
    """Runs the body with the base alone: adapters off, no dropout, no gradients.

    There is no second model: everything that trains is put back to what it was, for a while.
    """
    with torch.no_grad(), engine.in_eval_mode(task.model), engine.disable_adapters(task):
        yield


def check_reference(task: Any) -> None:
    """Refuses a reference that would be something else than the base.

    Raises:
        ConfigError: If there are no adapters to switch off, or something trains besides, or the
            base itself was changed when the adapters were added.
    """
    name = f"{type(task).__name__}(loss={task.hparams['loss']!r})"
    record = engine.record_of(task)
    if record is None:
        raise ConfigError(
            f"{name} needs adapters: its reference is the base with the adapters off, and without "
            "any the trained model would be compared with itself. Train with strategy='lora' or "
            "'qlora', or with LoRACallback; or take loss='orpo', which needs no reference."
        )
    problems = []
    parts = [(task.get_submodule(entry.name), entry) for entry in record.parts.values()]
    rewritten = [entry.name for _, entry in parts if entry.changed_base is not None]
    if rewritten:
        inits = {i.config.get("init_lora_weights") for _, e in parts for i in e.adapters.values()}
        problems.append(
            f"init_lora_weights={', '.join(sorted(map(str, inits)))} moved a part of the weights "
            f"of {', '.join(rewritten)} into the adapters: with them off, that part is missing. "
            "Use an initialisation that leaves the base alone, such as True"
        )
    known = {id(p) for part, e in parts for p in engine.trained_parameters(part, e).values()}
    named = task.named_parameters()
    others = [name for name, p in named if p.requires_grad and id(p) not in known]
    if others:
        problems.append(
            f"{len(others)} tensors train that are not adapters, such as {others[0]!r}: they would "
            "change the reference as well. Freeze them, adapt the whole model, or name them in "
            "modules_to_save"
        )
    if problems:
        raise ConfigError(f"{name} would have no fixed reference:" + itemize(problems))

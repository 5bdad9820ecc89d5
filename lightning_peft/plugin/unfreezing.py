"""Lightning's finetuning callbacks, with a base that stays frozen.

``BackboneFinetuning`` and subclasses of ``BaseFinetuning`` freeze modules, and unfreeze them at
some epoch. With adapters these are not the weights of a module but what of it trains: its adapters,
heads and modules trained in full. So their methods do not see the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft import engine
from lightning_peft.compat.lightning import forget_groups, trainer_of
from lightning_peft.errors import UnsupportedError
from lightning_peft.plugin.namespace import mixed_class

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import BaseFinetuning as _Base
else:
    _Base = object

FINETUNING_CALLBACK = "BaseFinetuning"
# Of the state of a callback.
_UNFROZEN = "unfrozen"


class StagedAdapters(_Base):
    """In front of a finetuning callback of a Trainer whose strategy adds adapters.

    Attributes:
        trained: Names of the parameters that it may freeze and unfreeze; ``None`` without adapters.
        unfrozen: Names of those that train now.
        restored: Those of a checkpoint, until the fit starts.
    """

    trained: frozenset[str] | None = None
    unfrozen: list[str] = []
    restored: list[str] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Waits for the adapters, which come with ``configure_model``."""
        self.trained = self.restored = None
        owner = super().setup.__qualname__.rpartition(".")[0]
        if getattr(trainer.strategy, "lifecycle", None) is None:
            super().setup(trainer, pl_module, stage)
        elif owner != FINETUNING_CALLBACK:
            raise UnsupportedError(
                f"callback {owner} has a `setup` of its own, which is not called, since "
                "Lightning's below it would freeze the module before it has adapters. Move what "
                "it does to `freeze_before_training`."
            )

    def freeze_adapters(self, module: nn.Module) -> None:
        """Freezes what the callback freezes, once the adapters are there."""
        forget_groups(self)
        self.trained = frozenset(n for n, p in module.named_parameters() if p.requires_grad)
        self.freeze_before_training(module)

    def freeze_before_training(self, pl_module: Any) -> None:
        """Freezes modules as the callback specifies; the base is frozen already."""
        with self._only_trained(pl_module):
            super().freeze_before_training(pl_module)

    def finetune_function(self, pl_module: Any, *given: Any, **named: Any) -> None:
        """Unfreezes modules as the callback specifies; the base stays frozen."""
        with self._only_trained(pl_module), self._new_by_identity():
            super().finetune_function(pl_module, *given, **named)

    @contextmanager
    def _only_trained(self, module: nn.Module) -> Iterator[None]:
        """Within the body, modules have those parameters only that train."""
        if self.trained is None:
            yield
            return
        hidden = []
        for name, child in module.named_modules():
            prefix = f"{name}." if name else ""
            before = dict(child._parameters)
            kept = {key: param for key, param in before.items() if prefix + key in self.trained}
            if len(kept) < len(before):
                hidden.append((child._parameters, before))
                child._parameters.clear()
                child._parameters.update(kept)
        try:
            yield
        finally:
            for held, before in hidden:
                # In their order, which is that of saved states.
                held.clear()
                held.update(before)
        self.unfrozen = [n for n, p in module.named_parameters() if p.requires_grad]
        record = engine.require_record(module)
        record.staged = (record.staged | self.trained).difference(self.unfrozen)

    @contextmanager
    def _new_by_identity(self) -> Iterator[None]:
        """Within the body, Lightning adds to an optimizer all that this one does not hold.

        It compares values, by which the zeros of one adapter are those of another one.
        """
        base: Any = next(c for c in type(self).__mro__ if c.__name__ == FINETUNING_CALLBACK)
        stated, compare = base.__dict__["filter_on_optimizer"], base.filter_on_optimizer

        def filter_on_optimizer(optimizer: Any, params: Iterable[Any]) -> list[Any]:
            held = {id(param) for group in optimizer.param_groups for param in group["params"]}
            found = list(params)
            # For its warning.
            compare(optimizer, [param for param in found if id(param) in held])
            return [param for param in found if id(param) not in held]

        base.filter_on_optimizer = staticmethod(filter_on_optimizer)
        try:
            yield
        finally:
            base.filter_on_optimizer = stated

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continues with what a checkpoint says trained; Lightning restores optimizers alone."""
        super().on_fit_start(trainer, pl_module)
        saved, self.restored = self.restored, None
        if saved is not None:
            self.unfrozen = saved
            for name, param in pl_module.named_parameters():
                if name in (self.trained or ()):
                    param.requires_grad_(name in saved)

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state, with the names of what trains."""
        return {**super().state_dict(), _UNFROZEN: list(self.unfrozen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the names until the fit starts."""
        self.restored = state_dict.get(_UNFROZEN)
        kept = {key: value for key, value in state_dict.items() if key != _UNFROZEN}
        super().load_state_dict(kept)


def _is_finetuning(callback: Any) -> bool:
    return any(cls.__name__ == FINETUNING_CALLBACK for cls in type(callback).__mro__)


def serve_finetuning(module: Any) -> None:
    """Lets the finetuning callbacks of the module's Trainer stage what trains."""
    for callback in getattr(trainer_of(module), "callbacks", []):
        if _is_finetuning(callback) and not isinstance(callback, StagedAdapters):
            callback.__class__ = mixed_class(StagedAdapters, type(callback))


def unfreeze_stages(module: Any) -> None:
    """Undoes what finetuning callbacks of the fit before froze, before another fit."""
    record = engine.require_record(module)
    for name, param in module.named_parameters():
        if name in record.staged:
            param.requires_grad_(True)
    record.staged = frozenset()


def freeze_stages(module: Any) -> None:
    """Freezes what begins to train later, before optimizers are made."""
    for callback in getattr(trainer_of(module), "callbacks", []):
        if isinstance(callback, StagedAdapters):
            callback.freeze_adapters(module)


def finetuning_problems(
    callbacks: list[Any], processes: int, averaging: frozenset[str]
) -> list[str]:
    """Returns the reasons why finetuning callbacks cannot be served."""
    names = [type(callback).__name__ for callback in callbacks if _is_finetuning(callback)]
    if not names:
        return []
    problems = []
    if processes > 1:
        problems.append(
            f"callback {names[0]} in several processes: DDP averages the gradients of what trains "
            "when it begins, and not of what is unfrozen later"
        )
    classes = {cls.__name__ for callback in callbacks for cls in type(callback).__mro__}
    if classes & averaging:
        problems.append(
            f"callback {names[0]} with {', '.join(sorted(classes & averaging))}, which averages "
            "what trains when the fit begins, and not what is unfrozen later"
        )
    return problems

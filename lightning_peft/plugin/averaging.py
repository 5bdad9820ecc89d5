"""Lightning's averaging callbacks, restricted to trained parameters.

They average ``module.parameters()``: with adapters, those would be packed 4-bit codes, and
a second copy of the base. So their methods get an object with the trained tensors in the place of
the module. What they write, and when, is Lightning's: files of ``WeightAveraging`` have the average
as their weights, and those of the run besides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.compat.lightning import (
    running_average,
    set_average,
    start_average,
    trainer_of,
)
from lightning_peft.compat.torch import BatchNorm
from lightning_peft.errors import CheckpointError, UnsupportedError, itemize
from lightning_peft.plugin.namespace import mixed_class

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Base
else:
    _Base = object

# Keys of a checkpoint, which are Lightning's.
_CURRENT, _AVERAGE = "current_model_state", "averaging_state"
# Keys of the state of a callback; the first is Lightning's.
_STATE, _NAMES = "average_model_state", "names"


class TrainedTensors(nn.Module):
    """The tensors ``names`` of a module, in its place; all else is looked up in the module."""

    def __init__(self, module: Any, names: list[str]) -> None:
        super().__init__()
        self.__dict__["whole"] = module
        for index, name in enumerate(names):
            owner, _, leaf = name.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._parameters:
                self.register_parameter(str(index), holder._parameters[leaf])
            else:
                self.register_buffer(str(index), holder._buffers[leaf])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"], name)

    def __deepcopy__(self, memo: Any) -> nn.Module:
        """Returns copies of the tensors, without the module."""
        copied = nn.Module()
        for key, param in self._parameters.items():
            assert param is not None
            copied.register_parameter(key, nn.Parameter(param.detach().clone(), False))
        for key, buffer in self._buffers.items():
            assert buffer is not None
            copied.register_buffer(key, buffer.detach().clone())
        return copied


class _OverTrained(_Base):
    """In front of an averaging callback of a Trainer whose strategy adds adapters.

    Attributes:
        names: The averaged tensors.
        holds_average: Whether the module has the average now, and the callback what trains.
        restored: What a checkpoint says of the average, until the fit starts.
    """

    names: list[str] = []
    holds_average = False
    restored: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Waits for the adapters, which come with ``configure_model``.

        Raises:
            UnsupportedError: If a subclass has a ``setup`` of its own.
        """
        if stage == "fit":
            self.begin()
        if not _adds_adapters(trainer):
            super().setup(trainer, pl_module, stage)
        elif (owner := super().setup.__qualname__.rpartition(".")[0]) not in _SERVED:
            raise UnsupportedError(
                f"callback {owner.rpartition('.')[2]} has a `setup` of its own, which is not "
                "called, since Lightning's below it would copy the whole model, before it has "
                "adapters. Move what it does to `on_fit_start`."
            )

    def begin(self) -> None:
        """Forgets what was averaged before."""
        set_average(self, None)
        self.holds_average, self.restored, self.names = False, None, []

    def check_same(self, saved: Iterable[str]) -> None:
        """Compares the averaged tensors with those of a checkpoint, by name."""
        problems = {*saved} ^ {*self.names}
        if problems:
            raise CheckpointError(
                "The checkpoint has averages of other tensors than train now:"
                + itemize(sorted(problems), 5)
                + "\nTrain and freeze the same layers as the run that wrote it."
            )

    def _view(self, module: Any) -> Any:
        return TrainedTensors(module, self.names) if self.names else module


class AdapterAveraging(_OverTrained):
    """In front of a ``WeightAveraging``."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the average, or what a checkpoint has of it.

        Raises:
            CheckpointError: If the checkpoint averaged other tensors.
        """
        if _adds_adapters(trainer):
            self.names = _trained_names(pl_module)
            view = self._view(pl_module)
            start_average(self, view, pl_module.device)
            saved, self.restored = self.restored, None
            if saved is not None:
                self._continue(view, saved)
        super().on_fit_start(trainer, pl_module)

    @torch.no_grad()
    def _continue(self, view: TrainedTensors, saved: dict[str, Any]) -> None:
        # The module has the averages: they are the weights of the file.
        self.check_same(saved[_CURRENT])
        for name, tensor in zip(self.names, _tensors_in_order(view), strict=True):
            tensor.copy_(saved[_CURRENT][name])
        running_average(self).load_state_dict(saved[_AVERAGE], strict=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *given: Any, **named: Any) -> None:
        """Updates the average."""
        super().on_train_batch_end(trainer, self._view(pl_module), *given, **named)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Updates the average."""
        super().on_train_epoch_end(trainer, self._view(pl_module))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Validates the average; outside of a fit, what the module has."""
        if self._is_over(trainer):
            return
        super().on_validation_epoch_start(trainer, self._view(pl_module))
        self.holds_average = bool(self.names)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Trains on."""
        if self._is_over(trainer):
            return
        super().on_validation_epoch_end(trainer, self._view(pl_module))
        self.holds_average = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the average in the module."""
        super().on_train_end(trainer, self._view(pl_module))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Puts the average in the place of the weights, and these next to it."""
        if self._is_over(trainer):
            return
        state, average = checkpoint["state_dict"], running_average(self)
        super().on_save_checkpoint(trainer, self._view(pl_module), checkpoint)
        if average is None or not self.names:
            return
        mine, kept = (
            {
                name: tensor.detach().clone()
                for name, tensor in zip(self.names, _tensors_in_order(holder), strict=True)
            }
            for holder in (self._view(pl_module), average.module)
        )
        current, averaged = (kept, mine) if self.holds_average else (mine, kept)
        checkpoint["state_dict"] = {name: averaged.get(name, state[name]) for name in state}
        checkpoint[_CURRENT] = current

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the average until the fit starts."""
        if not _adds_adapters(trainer):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        elif trainer.state.fn == "fit" and _CURRENT in checkpoint:
            self.restored = {key: checkpoint[key] for key in (_CURRENT, _AVERAGE)}

    def averages(self, trainer: Any) -> bool:
        """Whether there is an average that the module does not have already."""
        waits = self.names and not self.holds_average and not self._is_over(trainer)
        return bool(waits) and running_average(self) is not None

    def _is_over(self, trainer: Any) -> bool:
        # The average is in the module since the fit ended, unless that has another checkpoint now.
        return bool(self.names) and trainer.state.fn != "fit"

    @torch.no_grad()
    def exchange(self, module: Any) -> None:
        """Exchanges the values of the module and of the average."""
        holders = (self._view(module), running_average(self).module)
        for one, other in zip(*map(_tensors_in_order, holders), strict=True):
            value = one.clone()
            one.copy_(other)
            other.copy_(value)


class AdapterSWA(_OverTrained):
    """In front of a ``StochasticWeightAveraging``."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Makes the average, or what a checkpoint has of it.

        Raises:
            CheckpointError: If the checkpoint averaged other tensors.
            UnsupportedError: If the module has batch norms, whose statistics Lightning computes
                again for the average, over the whole module.
        """
        if not _adds_adapters(trainer):
            super().on_fit_start(trainer, pl_module)
            return
        norms = [name for name, one in pl_module.named_modules() if isinstance(one, BatchNorm)]
        if norms:
            raise UnsupportedError(
                f"callback {type(self).__name__}: Lightning trains an epoch more to compute the "
                "statistics of batch norms again, also of those of the frozen base:"
                + itemize(norms, 5)
                + "\nUse WeightAveraging, which averages them."
            )
        self.names = _trained_names(pl_module)
        view = self._view(pl_module)
        set_average(self, copy.deepcopy(view))
        saved, self.restored = self.restored, None
        if saved is not None:
            names = saved.get(_NAMES, [])
            self.check_same(names)
            tensors = [saved[_STATE][str(names.index(name))] for name in self.names]
            running_average(self).load_state_dict({str(i): one for i, one in enumerate(tensors)})
        super().on_fit_start(trainer, view)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Updates the average."""
        super().on_train_epoch_start(trainer, self._view(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the average in the module."""
        super().on_train_end(trainer, self._view(pl_module))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the average until the fit starts."""
        super().load_state_dict(state_dict)
        self.restored = state_dict if state_dict[_STATE] is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Returns Lightning's state, with the names of the averaged tensors."""
        return {**super().state_dict(), _NAMES: list(self.names)}


def _tensors_in_order(holder: nn.Module) -> list[torch.Tensor]:
    tensors: dict[str, Any] = {**holder._parameters, **holder._buffers}
    return [tensors[key] for key in sorted(tensors, key=int)]


def _adds_adapters(trainer: Any) -> bool:
    return getattr(trainer.strategy, "lifecycle", None) is not None


def _trained_names(module: nn.Module) -> list[str]:
    state = engine.trainable_state_dict(module)
    trained = [name for name, param in module.named_parameters() if param.requires_grad]
    return trained + [name for name, _ in module.named_buffers() if name in state]


_SERVED = {"WeightAveraging": AdapterAveraging, "StochasticWeightAveraging": AdapterSWA}
AVERAGING_CALLBACKS = frozenset(_SERVED)


def serve_averages(module: Any) -> None:
    """Lets the averaging callbacks of the module's Trainer average what trains."""
    for callback in getattr(trainer_of(module), "callbacks", []):
        kinds = [cls.__name__ for cls in type(callback).__mro__]
        mixin = next((_SERVED[name] for name in kinds if name in _SERVED), None)
        if mixin is not None and not isinstance(callback, mixin):
            callback.__class__ = mixed_class(mixin, type(callback))
            callback.begin()


def continued_tensors(module: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a checkpoint that training continues from, by name.

    Those of the run, where an averaging callback of its Trainer takes them out of the file.
    """
    callbacks = getattr(trainer_of(module), "callbacks", [])
    averages = any(isinstance(callback, AdapterAveraging) for callback in callbacks)
    current = checkpoint.get(_CURRENT, {}) if averages else {}
    return {**checkpoint["state_dict"], **current}


@contextmanager
def averages_in(module: Any) -> Iterator[None]:
    """Within the body, the module has the average that a callback keeps of it, if one does."""
    trainer = trainer_of(module)
    found = [
        callback
        for callback in getattr(trainer, "callbacks", [])
        if isinstance(callback, AdapterAveraging) and callback.averages(trainer)
    ]
    for callback in found:
        callback.exchange(module)
    try:
        yield
    finally:
        for callback in reversed(found):
            callback.exchange(module)

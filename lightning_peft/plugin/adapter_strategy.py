"""What a strategy does differently when the module has adapters; mixed into strategy classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft import engine
from lightning_peft.errors import CheckpointError
from lightning_peft.plugin.checkpoint_io import FILES, KEY, AdapterCheckpointIO
from lightning_peft.plugin.hyperparameters import without_objects
from lightning_peft.plugin.namespace import realize, root_of
from lightning_peft.plugin.resume import make_resumable, rng_state, set_rng_state

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base

    from lightning_peft.plugin.lifecycle import Lifecycle
else:
    _Base = object

log = logging.getLogger(__name__)

# The name of an entry of every checkpoint's state_dict: whoever loads the file without this
# package is stopped and reads it, instead of getting the bare base.
GUARD = "adapters only: load this file with lightning_peft.load_from_checkpoint"


class AdapterStrategy(_Base):
    """Injection, adapter-only checkpoints, strict restore and exact resume for any strategy."""

    lifecycle: Lifecycle
    _restored: bool = False
    _resume_from: dict[str, Any] | None = None

    def connect(self, model: Any) -> None:
        """Arranges for the injection at the end of ``configure_model``."""
        super().connect(model)
        self._restored, self._resume_from = False, None
        self.lifecycle.install(model, self)

    def setup(self, trainer: Any) -> None:
        """Checks that nothing was lost, then lets the strategy set up."""
        self.lifecycle.check_restored(self._restored)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves the module; the adapters' master weights stay in float32 under ``bf16-true``."""
        super().model_to_device()
        for param in engine.all_adapter_parameters(self.lightning_module):
            if param.dtype in (torch.float16, torch.bfloat16):
                param.data = param.data.float()

    def setup_optimizers(self, trainer: Any) -> None:
        """Lets the module configure its optimizers, then checks that they hold the adapters."""
        super().setup_optimizers(trainer)
        self.lifecycle.check_optimizers(self.lightning_module, self.optimizers)

    def process_dataloader(self, dataloader: Any) -> Any:
        """Lets the training DataLoader resume in the middle of an epoch."""
        dataloader = super().process_dataloader(dataloader)
        trainer = self.lightning_module.trainer
        if not trainer.training:
            return dataloader

        def consumed() -> int:
            progress = trainer.fit_loop.epoch_loop.batch_progress
            return 0 if progress.is_last_batch else int(progress.current.ready)

        return make_resumable(dataloader, consumed)

    def on_train_start(self) -> None:
        """When resuming: back to the place in the epoch, then to the random state."""
        super().on_train_start()
        resume, self._resume_from = self._resume_from, None
        if resume is None:
            return
        states = resume["rng"]
        if len(states) != self.world_size_now():
            log.info("The checkpoint is of another number of processes: random state not restored.")
            return
        set_rng_state(states[self.global_rank_now()])
        fit_loop = self.lightning_module.trainer.fit_loop
        if fit_loop._combined_loader is not None and fit_loop._data_fetcher is not None:
            fit_loop._combined_loader_states_to_load = resume["loaders"]
            fit_loop._load_combined_loader_states()
            iter(fit_loop._data_fetcher)

    def world_size_now(self) -> int:
        """Number of processes."""
        return int(getattr(self, "world_size", 1))

    def global_rank_now(self) -> int:
        """Rank of this process."""
        return int(getattr(self, "global_rank", 0))

    @property
    def checkpoint_io(self) -> Any:
        """The CheckpointIO in use, always around or inside this package's own."""
        current = self._checkpoint_io
        root = root_of(self) or ""
        if current is None:
            self._checkpoint_io = realize(AdapterCheckpointIO, root)()
        elif hasattr(type(current), "checkpoint_io"):
            innermost = current
            while hasattr(type(innermost._checkpoint_io), "checkpoint_io"):
                innermost = innermost._checkpoint_io
            if innermost._checkpoint_io is None:
                current.checkpoint_io = realize(AdapterCheckpointIO, root)()
            elif not isinstance(innermost._checkpoint_io, AdapterCheckpointIO):
                innermost._checkpoint_io = realize(AdapterCheckpointIO, root)(
                    innermost._checkpoint_io
                )
        elif not isinstance(current, AdapterCheckpointIO):
            self._checkpoint_io = realize(AdapterCheckpointIO, root)(current)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Everything but the frozen base; see ``docs/checkpoints``."""
        if engine.record_of(self.lightning_module) is None:
            state: dict[str, Any] = super().lightning_module_state_dict()
            return state
        return engine.trainable_state_dict(self.lightning_module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Adds what makes the file self-describing, and hands it to the CheckpointIO."""
        module = self.lightning_module
        if engine.record_of(module) is not None:
            described = engine.describe(module)
            described["rng"] = self._rng_of_all_ranks()
            checkpoint, described["left_out"] = without_objects(checkpoint, module)
            facts = {"epoch": checkpoint["epoch"], "global_step": checkpoint["global_step"]}
            if self.is_global_zero:
                described[FILES] = engine.packed_adapters(module, facts)
            # An entry with an impossible shape is refused even by load_state_dict(strict=False).
            described["guard"] = min(engine.require_record(module).frozen)
            guards = {GUARD: torch.empty(0), described["guard"]: torch.empty(0)}
            state = {**checkpoint["state_dict"], **guards}
            checkpoint = {**checkpoint, "state_dict": state, KEY: described}
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def _rng_of_all_ranks(self) -> list[Any]:
        mine = rng_state()
        if self.world_size_now() == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size_now()
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Reads a checkpoint; see :class:`AdapterCheckpointIO` for what is refused."""
        # The CheckpointIO is asked first, so that it is ours before Lightning's code uses it.
        assert self.checkpoint_io is not None
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return unguarded(checkpoint)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads adapters strictly, on the base they were trained on.

        Raises:
            CheckpointError: If the checkpoint does not fit; everything that differs is named.
            BaseMismatchError: If the frozen base is another one.
        """
        module = self.lightning_module
        if KEY in checkpoint:
            engine.check_description(module, checkpoint[KEY])
        engine.load_trainable_state_dict(module, checkpoint["state_dict"])
        if KEY not in checkpoint:
            raise CheckpointError(
                "The checkpoint was not written by lightning_peft: it does not say which base it "
                "belongs to."
            )
        self._restored = True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers, then what makes the rest of the run the same."""
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            engine.restore_paging(optimizer)
        loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self._resume_from = {
            "rng": checkpoint[KEY]["rng"],
            "loaders": loops.get("combined_loader", []),
        }

    def on_exception(self, exception: BaseException) -> None:
        """Gives the module its own ``configure_model`` back."""
        self.lifecycle.uninstall()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Gives the module its own ``configure_model`` back."""
        self.lifecycle.uninstall()
        super().teardown()


def unguarded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns ``checkpoint`` without the entries that stop others from loading it."""
    if KEY not in checkpoint:
        return checkpoint
    guards = (GUARD, checkpoint[KEY].get("guard"))
    state = {k: v for k, v in checkpoint.get("state_dict", {}).items() if k not in guards}
    return {**checkpoint, "state_dict": state}

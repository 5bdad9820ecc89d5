"""Mixin with the adapter behaviour of strategies."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import checkpoint_io_of, set_checkpoint_io
from lightning_peft.errors import CheckpointError
from lightning_peft.plugin.adapter_checks import check_frozen, check_optimizers
from lightning_peft.plugin.automatic_checkpointing import AutomaticCheckpointing
from lightning_peft.plugin.averaging import averages_in, continued_tensors
from lightning_peft.plugin.background_saving import BackgroundSaves, check_background_saves
from lightning_peft.plugin.checkpoint_content import (
    CHECKPOINT_KEY,
    load_tensors,
    pack_checkpoint,
    unpack_checkpoint,
    without_objects,
)
from lightning_peft.plugin.checkpoint_io import (
    WholeFileCheckpointIO,
    is_local,
    match_adapter_folder,
    put_back_adapter_folder,
    read_checkpoint,
    remove_adapter_folder,
    write_adapter_folder,
)
from lightning_peft.plugin.data_initialization import initialize_from_data
from lightning_peft.plugin.divergence import check_processes
from lightning_peft.plugin.failure_notice import FailureNoticeStrategy
from lightning_peft.plugin.injection_settings import KEPT_IN_FLOAT32
from lightning_peft.plugin.loops import TrainingLoops
from lightning_peft.plugin.mid_epoch import resumes_mid_epoch
from lightning_peft.plugin.namespace import bind_to_lightning, namespace_of
from lightning_peft.plugin.optimization import (
    add_adapters_to_optimizers,
    disable_activation_checkpointing,
    enable_activation_checkpointing,
    float32_advice,
    freeze_unoptimized,
    log_info,
    optimized_parameter_ids,
    rank_budget,
    replace_optimizers,
    scale_b_rates,
)

if TYPE_CHECKING:
    from lightning_peft.plan.activation_decision import ActivationDecision
    from lightning_peft.plugin.lifecycle import Lifecycle

log = logging.getLogger(__name__)
_PLACE = ("epoch", "global_step")  # Of a checkpoint, and of its adapter folder.


class AdapterStrategy(FailureNoticeStrategy):
    """Injection, adapter-only checkpoints, strict restore and exact resume for any strategy."""

    lifecycle: Lifecycle
    _restored = False
    _resumed_from: tuple[Any, dict[str, Any]] | None = None
    _warned_hyperparameters = False
    _training_loops: TrainingLoops | None = None
    _master_weights: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    _master_buffers: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    _checkpointing: Any = None
    _automatic: AutomaticCheckpointing | None = None
    _names_before_hooks: tuple[str, ...] = ()
    _budget: engine.RankBudget | None = None

    @property
    def shards_base(self) -> bool:
        """Whether each process keeps a part of the frozen base."""
        return False

    @property
    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _loops(self) -> TrainingLoops:
        if self._training_loops is None:
            halves, failures = self.lifecycle.halve_batch_on_oom, self.lifecycle.failures
            self._training_loops = TrainingLoops(self._module.trainer, failures, halves)
        return self._training_loops

    @property
    def _saves(self) -> BackgroundSaves:
        return self.lifecycle.saves

    def connect(self, model: Any) -> None:
        """Arranges for the injection at the end of ``configure_model``."""
        super().connect(model)
        self._restored, self._training_loops = False, None
        self.lifecycle.checks.restored = engine.RestoredState()
        self.lifecycle.install(model, self)

    def setup(self, trainer: Any) -> None:
        """Checks that no adapters were lost, and keeps their master weights in float32.

        Under ``bf16-true`` and ``16-true`` Lightning casts the module after the restore.
        """
        self.lifecycle.check_restored(self._restored)
        self.lifecycle.checks.new_run()
        if trainer.state.fn == "fit":
            initialize_from_data(self)
        if self._saves.enabled:
            check_background_saves(trainer, not hasattr(self.checkpoint_io, "background"))
            self._saves.come_before_looking(trainer.checkpoint_callbacks)
        self._automatic = None
        if trainer.state.fn == "fit":
            self._loops.attach()
            advice = float32_advice(self._module, self.root_device, trainer.precision)
            if advice:
                log_info(self, advice)
        kept = [one for one in self._module.modules() if getattr(one, KEPT_IN_FLOAT32, False)]
        if getattr(self.precision_plugin, "scaler", None) is not None:
            # Of ``16-mixed``, which unscales no 16-bit gradients.
            kept = [self._module]
        trained = [p for one in kept for p in one.parameters() if p.requires_grad]
        masters = [*engine.all_adapter_parameters(self._module), *trained]
        self._master_weights = [(p, p.data) for p in masters]
        self._master_buffers = engine.adapter_buffers(self._module)
        super().setup(trainer)
        # Last: it extends the class that sharding gives to blocks, and takes that away again.
        if enable_activation_checkpointing(self, self.lifecycle.injection.gradient_checkpointing):
            self._automatic = AutomaticCheckpointing(self)

    def model_to_device(self) -> None:
        """Moves the module; adapters that a precision plugin cast down get their values back."""
        super().model_to_device()
        masters, self._master_weights = self._master_weights, []
        for param, master in masters:
            if param.dtype in (torch.float16, torch.bfloat16):
                param.data = master.to(param.device, torch.float32)
        buffers, self._master_buffers = self._master_buffers, []
        for holder, key, value in buffers:
            if holder[key].dtype in (torch.float16, torch.bfloat16):
                holder[key] = value.to(holder[key].device, torch.float32)

    def setup_optimizers(self, trainer: Any) -> None:
        """Lets the module configure its optimizers, then checks that they hold the adapters."""
        super().setup_optimizers(trainer)
        # Before and after: frozen weights that the module chose leave some optimizers.
        held = optimized_parameter_ids(self)
        optimizers = add_adapters_to_optimizers(self)
        held |= optimized_parameter_ids(self)
        replace_optimizers(self, self.lifecycle.injection.optimizer)
        scale_b_rates(self, self.lifecycle.injection.lora_plus_lr_ratio)
        engine.freeze_unoptimized_copies(self._module, held)
        freeze_unoptimized(self, held)
        if self.lifecycle.checks.mode != "off":
            check_optimizers(self._module, optimizers)
        check_frozen(self._module)
        engine.check_momentum_copies(self._module)
        self._budget = rank_budget(self)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds the penalty of AdaLoRA to the loss, which PEFT adds in its model class."""
        self.lifecycle.failures.begin_backward()
        if self._budget is not None:
            batches = self._module.trainer.accumulate_grad_batches
            closure_loss = closure_loss + self._budget.penalty() / batches
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        """Steps, and lets AdaLoRA cut ranks."""
        closure = self._loops.batches.watched(closure)
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        if self._budget is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._budget.after_step(held)
        return result

    def on_train_start(self) -> None:
        """When resuming: back to what was under way."""
        self.lifecycle.failures.monitored_barrier("start of training")
        super().on_train_start()
        engine.link_late_copies(self._module)
        self.lifecycle.divergence.start(self._module.trainer)
        self.lifecycle.checks.start(self)
        if self._resumed_from is not None and self.is_global_zero:
            with averages_in(self._module):
                path, place = self._resumed_from
                match_adapter_folder(path, place, partial(self._packed, place))
        self._loops.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Verifies on the first batch, if asked to."""
        super().on_train_batch_start(batch, batch_idx)
        if not self._loops.is_trial:
            self.lifecycle.divergence.at_batch(self._module.trainer)
        self._loops.merge_epoch_sums()
        self.decide_checkpointing(batch)
        self.lifecycle.checks.before_batch(self, batch)

    def decide_checkpointing(self, batch: Any) -> ActivationDecision | None:
        """Decides whether activations of ``batch`` are kept; ``None`` where that is not open."""
        return None if self._automatic is None else self._automatic.before_batch(batch)

    def on_train_end(self) -> None:
        """Ends what still waits for a first step."""
        super().on_train_end()
        if not self._loops.is_trial:
            self.lifecycle.divergence.check(self._module.trainer)
        unfinished = self._budget.unfinished() if self._budget is not None else None
        if unfinished and self.is_global_zero:
            log.warning(unfinished)
        self.lifecycle.checks.end()
        check_processes(self)
        if self._saves.enabled:
            self._saves.wait()
            # Others read what the first process writes.
            self.barrier("async_save")

    def on_exception(self, exception: BaseException) -> None:
        """Lets the other processes know, and waits for checkpoints that are being written."""
        self.lifecycle.failures.send(exception)
        super().on_exception(exception)
        self._saves.wait_after(exception)

    @property
    def checkpoint_io(self) -> Any:
        """The CheckpointIO in use: the user's own, else one that writes whole files."""
        ours = bind_to_lightning(WholeFileCheckpointIO, namespace_of(self) or "")
        current = checkpoint_io_of(self)
        if current is None or type(current) is ours.lightning_class:
            set_checkpoint_io(self, ours())
        elif hasattr(type(current), "checkpoint_io"):
            # A wrapper takes it only where it has none.
            current.checkpoint_io = ours()
        io = checkpoint_io_of(self)
        if self._saves.enabled and isinstance(io, WholeFileCheckpointIO):
            io.background = self._saves
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        set_checkpoint_io(self, io)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns everything but the frozen base."""
        usual, adapted = super().lightning_module_state_dict, engine.record_of(self._module)
        state = usual() if adapted is None else engine.trainable_state_dict(self._module)
        self._names_before_hooks = tuple(state)
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Writes the checkpoint with its description, and its adapter folder."""
        self.lifecycle.failures.monitored_barrier("save_checkpoint")
        # No more than one is in memory.
        self._saves.wait()
        if engine.record_of(self._module) is None:
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        self.lifecycle.divergence.check(self._module.trainer)
        check_processes(self)
        check_frozen(self._module)
        engine.check_momentum_copies(self._module)
        with averages_in(self._module):
            checkpoint = self._with_metadata(checkpoint)
            if self.is_global_zero and is_local(filepath):
                # First, so that an existing checkpoint is complete.
                files = self._packed({name: checkpoint[name] for name in _PLACE})
                self._saves.run(partial(write_adapter_folder, filepath, files))
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        self._wait_outside_of_run()

    def _packed(self, place: dict[str, Any]) -> dict[str, bytes]:
        return engine.packed_adapters(self._module, {**self.lifecycle.provenance, **place})

    def _wait_outside_of_run(self) -> None:
        if self._module.trainer.state.status != "running":
            self._saves.wait()

    def _with_metadata(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        described = engine.describe(self._module)
        # Files of weights only are not resumed from.
        whole = "optimizer_states" in checkpoint
        processes = engine.gathered(self._loops.state(), self.world_size) if whole else []
        described["processes"] = processes
        described |= engine.describe_optimizers(self._module, self.optimizers) if whole else {}
        described["rank_budget"] = self._budget.state() if self._budget and whole else None
        warned = self._warned_hyperparameters
        checkpoint, described["left_out"] = without_objects(checkpoint, not warned)
        self._warned_hyperparameters = warned or bool(described["left_out"])
        # Others write nothing, and need not read these weights.
        excluded = engine.excluded_weights(self._module) if self.is_global_zero else {}
        before = self._names_before_hooks
        return pack_checkpoint(self._module, checkpoint, described, before, excluded)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint and its adapter folder, once what replaces it is whole."""
        self._saves.run(partial(self._remove_checkpoint, filepath))
        self._wait_outside_of_run()

    def _remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and is_local(filepath):
            remove_adapter_folder(filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Reads a checkpoint; nothing in it is executed unless ``weights_only`` is ``False``."""
        self._saves.wait()
        if self.world_size > 1:
            # Which one is newest, processes may see differently while the first begins its record.
            checkpoint_path = self.broadcast(checkpoint_path)
        fits = self._module.trainer.state.fn == "fit"
        if self.is_global_zero and fits:
            put_back_adapter_folder(checkpoint_path)
        checkpoint = read_checkpoint(super().load_checkpoint, checkpoint_path, weights_only)
        place = {name: checkpoint.get(name) for name in _PLACE}
        self._resumed_from = (checkpoint_path, place) if fits else None
        checkpoint = unpack_checkpoint(self._module, checkpoint)
        if fits and self._loops.batches.restart is not None:
            self._loops.batches.restart.divide(checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads adapters strictly, whatever ``strict`` specifies, on the base they were trained on.

        Where ``strict`` is false, what hooks of the module took out of the file may be missing.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise CheckpointError(
                "The checkpoint was not written with adapters: it does not say which base and "
                "which adapters it is for. If it holds the base model's weights, load it into the "
                "module first (load_from_checkpoint), and give that module to the Trainer."
            )
        engine.restore_from_batches(self._module, checkpoint[CHECKPOINT_KEY])
        engine.check_description(self._module, checkpoint[CHECKPOINT_KEY])
        load_tensors(self._module, checkpoint, strict)
        if self.world_size > 1:
            continued = continued_tensors(self._module, checkpoint)
            self.lifecycle.checks.restored.note_tensors(continued)
        self._restored = True
        self._resume(checkpoint)

    def _resume(self, checkpoint: Mapping[str, Any]) -> None:
        trainer, saved = self._module.trainer, checkpoint[CHECKPOINT_KEY]["processes"]
        if trainer.state.fn != "fit" or not saved:
            return
        if len(saved) != self.world_size:
            log.warning(
                "The checkpoint is from %d processes and this run has %d: it continues with other "
                "random numbers and another order of the data.",
                len(saved),
                self.world_size,
            )
            return
        self._loops.resume(saved[self.global_rank], resumes_mid_epoch(trainer, checkpoint))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores the optimizers, and remembers what makes the rest of the run the same.

        Raises:
            CheckpointError: If the states are those of other optimizers.
        """
        engine.check_same_optimizers(checkpoint[CHECKPOINT_KEY], self._module, self.optimizers)
        super().load_optimizer_state_dict(checkpoint)
        self.lifecycle.checks.restored.note_states(checkpoint["optimizer_states"])
        for optimizer in self.optimizers:
            engine.restore_paging(optimizer)
        if self._budget is not None:
            self._budget.load_state(checkpoint[CHECKPOINT_KEY]["rank_budget"])

    def teardown(self) -> None:
        """Gives the module its own ``configure_model`` and blocks back, also after errors."""
        disable_activation_checkpointing(self)
        self._automatic = self._budget = None
        if self._training_loops is not None:
            self._training_loops.detach()
        self.lifecycle.uninstall()
        self.lifecycle.checks.stop()
        self.lifecycle.failures.stop()
        super().teardown()
        self._saves.close()

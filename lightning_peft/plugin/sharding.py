"""``sharding="fsdp2"``: ``1/N`` of the frozen base on each of ``N`` devices."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_peft import engine
from lightning_peft.compat.lightning import combined_loader
from lightning_peft.errors import ConfigError, LifecycleError, itemize
from lightning_peft.plugin.adapter_checks import check_same_base_on_all_ranks

if TYPE_CHECKING:
    from pytorch_lightning.strategies import DDPStrategy as _Base
else:
    # As FailureNoticeStrategy does.
    _Base = ABC

_FSDP2 = "fsdp2"
_CONTEXTS = {"validation_step": "val_step_context"}


class ShardedBaseStrategy(_Base):
    """Shards the frozen base once it is injected, restored, cast and on its device.

    Everything else is DDP: it averages the gradients of what trains, which every process holds.
    """

    if TYPE_CHECKING:
        sharding: Literal["fsdp2"] | None
        dp_shard_size: int | None
        offload: bool

    @property
    def shards_base(self) -> bool:
        """Whether each process keeps a part of the frozen base."""
        return self.sharding == _FSDP2 and self.world_size > 1

    @property
    def share(self) -> engine.Share:
        """The part of the frozen base that this process keeps."""
        count = self.dp_shard_size or self.world_size
        if self.world_size % count:
            raise ConfigError(
                f"dp_shard_size={count} with {self.world_size} processes: each base is shared by "
                "as many processes, so the first number divides the second."
            )
        return engine.Share(self.global_rank % count, count, self.offload)

    def setup_environment(self) -> None:
        """Refuses what one process cannot do, before a base is loaded."""
        if self.offload and not self.shards_base and self.root_device.type != "cpu":
            raise ConfigError(
                f"offload=True in one process on {self.root_device}: parts of a base stay in the "
                "memory of the CPU where processes share it. Take several, or offload=False."
            )
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Checks what sharding cannot serve, before anything is spread."""
        module: Any = self.lightning_module
        if self.shards_base:
            engine.check_shardable(module)
            # Put together from pieces of different bases, it would be none of them.
            check_same_base_on_all_ranks(module, self.world_size)
            for loop, _ in _loops(trainer)[1:]:
                # Gathered in inference mode, weights could not be saved for a backward pass later.
                loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Leaves a part of the frozen base in each process, and moves the rest of the module."""
        module: Any = self.lightning_module
        if not self.shards_base:
            super().model_to_device()
            return
        # Around what resuming has added by now, and before optimizers ask how long training is.
        for loop, numbers in _loops(module.trainer):
            loop.__dict__["setup_data"] = partial(_set_up_data, loop, loop.setup_data, numbers)
        share = self.share
        shapes = engine.keep_own_part(module, share, self.root_device)
        with engine.parts_left_in_place(module, share):
            super().model_to_device()
        engine.shard_base(module, self.root_device, shapes, share)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, through its own call."""
        return self._called("validation_step", super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, through its own call."""
        return self._called("test_step", super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, through its own call."""
        return self._called("predict_step", super().predict_step, *args, **kwargs)

    def _called(self, step: str, usual: Any, *args: Any, **kwargs: Any) -> Any:
        """Outside of a fit no DDP calls the module, and FSDP gathers when it is called."""
        module = self.lightning_module
        if not self.shards_base or self.model is not module:
            return usual(*args, **kwargs)
        assert module is not None
        context = getattr(self.precision_plugin, _CONTEXTS.get(step, f"{step}_context"))
        with context():
            return self._forward_redirection(module, module, step, *args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        """Ends the step that the error was in."""
        super().on_exception(exception)
        module: Any = self.lightning_module
        if self.shards_base and module is not None:
            engine.leave_step(module)

    def teardown(self) -> None:
        """Gives the loops their own methods back."""
        if self.shards_base and self.lightning_module is not None:
            for loop, _ in _loops(self.lightning_module.trainer):
                loop.__dict__.pop("setup_data", None)
        super().teardown()

    def on_validation_end(self) -> None:
        """Gives the memory of gathered weights back, which no backward pass does here."""
        super().on_validation_end()
        module: Any = self.lightning_module
        if self.shards_base:
            engine.reshard_base(module)


@contextmanager
def early_share(strategy: Any, peft_config: Any) -> Iterator[None]:
    """Within the body, a process keeps its part of each weight as soon as it is quantized.

    What is built is built on the CPU, where weights stay in their file until they are read.
    """
    share = None
    if getattr(strategy, "shards_base", False):
        share = engine.early_share(peft_config, strategy.share)
    with engine.keeping_share(share), nullcontext() if share is None else torch.device("cpu"):
        yield


def _loops(trainer: Any) -> list[tuple[Any, str]]:
    """The loops over data, training's first, and where the Trainer has their numbers of batches."""
    return [
        (trainer.fit_loop, "num_training_batches"),
        (trainer.fit_loop.epoch_loop.val_loop, "num_val_batches"),
        (trainer.validate_loop, "num_val_batches"),
        (trainer.test_loop, "num_test_batches"),
        (trainer.predict_loop, "num_predict_batches"),
    ]


def _set_up_data(loop: Any, usual: Any, numbers: str) -> None:
    """Requests loaders as usual, and compares the numbers of their batches between processes."""
    before = combined_loader(loop)
    usual()
    if combined_loader(loop) is before:
        return
    everyone = engine.gathered(getattr(loop.trainer, numbers), loop.trainer.world_size)
    if all(one == everyone[0] for one in everyone):
        return
    limit = {"num_training_batches": "train"}.get(numbers, numbers.split("_")[1])
    rows = [f"process {rank}: {number}" for rank, number in enumerate(everyone)]
    raise LifecycleError(
        f"The processes have different numbers of batches ({numbers}):"
        + itemize(rows, 8)
        + "\nWith sharding='fsdp2' each batch needs all processes, so those with more would wait "
        "for the others until the timeout. Give each process as many: a number of rows that "
        "batch_size times processes divides, drop_last=True in a sampler of your own, or "
        f"limit_{limit}_batches. Or use one process, or sharding=None."
    )


def check_sharding(arguments: Any) -> None:
    """Checks ``sharding`` and what it does not go together with."""
    value, size = arguments.sharding, arguments.dp_shard_size
    if value is None and (size is not None or arguments.offload):
        raise ConfigError(
            f"dp_shard_size={size!r}, offload={arguments.offload}: of a base that is shared by "
            "processes. Give sharding='fsdp2' too."
        )
    if value is None:
        return
    if size is not None and size < 2:
        raise ConfigError(
            f"sharding={value!r}, dp_shard_size={size!r}: 2 processes or more share a base; None "
            "means all of them."
        )
    if value != _FSDP2:
        raise ConfigError(f"sharding={value!r}: choose 'fsdp2', or None for a whole base each.")
    problems = []
    if arguments.gradient_checkpointing not in (True, False, "auto"):
        problems.append(
            f"gradient_checkpointing={arguments.gradient_checkpointing!r}: what a budget keeps is "
            "measured with whole weights. Use True, False or 'auto'"
        )
    if getattr(arguments, "load_in_8bit", False):
        problems.append("load_in_8bit=True, whose scales are not sharded. Use 4 bits")
    if problems:
        raise ConfigError("sharding='fsdp2' cannot be used with:" + itemize(problems))

"""Initialization of adapters from the first training batches (EVA, CorDA, LoRA-GA)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from lightning_peft import engine
from lightning_peft.compat.lightning import trainer_of, training_data
from lightning_peft.errors import ConfigError, UnsupportedError, itemize
from lightning_peft.plugin.optimization import log_info
from lightning_peft.plugin.tracked_loader import generator_states, set_generator_states


def initialize_from_data(strategy: Any) -> None:
    """Runs batches through the module before it has optimizers, where an adapter requests it.

    In a run that was resumed, the checkpoint has the values; not one from before the first batch.

    Raises:
        UnsupportedError: With ``sharding="fsdp2"``, manual optimization or momentum copies.
        ConfigError: If there are too few batches or tokens.
    """
    module = strategy.lightning_module
    if not engine.lacks_data(module):
        return
    _check(strategy, module)
    module.to(strategy.root_device)
    loader = training_data(trainer_of(module))
    before = generator_states([loader])

    def batches() -> Iterator[Any]:
        set_generator_states([loader], before)
        # As many in each process, and other ones: loaders have no samplers for processes yet.
        source, processes, count = iter(loader), strategy.world_size, 0
        while len(some := [*islice(source, processes)]) == processes:
            count += 1
            yield strategy.batch_to_device(some[strategy.global_rank], strategy.root_device)
        if some and not count:
            raise ConfigError(
                "An init_lora_weights that is made from data needs a batch for each of "
                f"{processes} processes, and the training data has {len(some)}: use a smaller "
                "batch_size, or fewer processes."
            )

    def run(batch: Any) -> Tensor:
        with strategy.precision_plugin.train_step_context():
            return engine.default_step(module, batch)

    for sentence in engine.initialize_from_batches(module, batches, run, strategy.world_size):
        log_info(strategy, f"{sentence}.")
    set_generator_states([loader], before)


def _check(strategy: Any, module: Any) -> None:
    problems = []
    if strategy.shards_base:
        problems.append(
            "sharding='fsdp2': no process has whole weights to run with. Initialise in one process "
            "(a fit with max_steps=1), and resume from its checkpoint"
        )
    if not module.automatic_optimization:
        problems.append("manual optimization: training_step would train")
    if engine.require_record(module).momentum_copies:
        problems.append("momentum copies, which need adapters of the same ranks")
    if problems:
        raise UnsupportedError(
            "An init_lora_weights that is made from data does not work with:" + itemize(problems)
        )

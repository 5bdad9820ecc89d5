"""Private parts of Lightning's Trainer, loops, callbacks and CLI.

Nothing here imports Lightning: every object comes from the package that the user imported. Tested
with Lightning 2.6. Where no public alternative is named, there is none.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch.optim.swa_utils import AveragedModel

# Keys of the hyperparameters that LightningCLI saves.
INSTANTIATOR, CLASS_PATH = "_instantiator", "_class_path"
# The method of the loop over epochs that comes between the setup of the loaders and a fetch.
LOAD_LOADER_STATES = "_load_combined_loader_states"
# The functions that call hooks of the module and of callbacks.
HOOK_CALLERS = ("_call_lightning_module_hook", "_call_callback_hooks")


def trainer_of(module: Any) -> Any:
    """Returns the Trainer of a module, or ``None``.

    Public alternative: ``module.trainer``, which raises where there is none.
    """
    return module._trainer


def is_compiled(module: Any) -> bool:
    """Returns whether ``torch.compile`` made a LightningModule."""
    return getattr(module, "_compiler_ctx", None) is not None


def is_mock_optimizer(optimizer: Any) -> bool:
    """Returns whether an optimizer is Lightning's placeholder for none."""
    return type(optimizer).__name__ == "_MockOptimizer"


def start_method_of(strategy: Any) -> str:
    """Returns how a strategy starts its processes; ``"popen"`` runs the script again."""
    return str(getattr(strategy, "_start_method", "popen"))


def checkpoint_io_of(strategy: Any) -> Any:
    """Returns the CheckpointIO that a strategy was given, or ``None``.

    Public alternative: ``strategy.checkpoint_io``, which makes one where there is none.
    """
    return strategy._checkpoint_io


def set_checkpoint_io(strategy: Any, io: Any) -> None:
    """Sets the CheckpointIO, past an overridden property."""
    strategy._checkpoint_io = io


def pruned_parameters(callback: Any) -> list[tuple[Any, str]]:
    """Returns the modules and names of parameters that a ``ModelPruning`` has chosen."""
    return list(callback._parameters_to_prune)


def running_average(callback: Any) -> Any:
    """Returns the average that a callback keeps of the weights, or ``None``."""
    return callback._average_model


def set_average(callback: Any, average: Any) -> None:
    """Gives an averaging callback its average; ``None`` takes it away, and when it was updated.

    Lightning keeps that for the next fit, and would then average nothing until it is as long.
    """
    callback._average_model = average
    if average is None and hasattr(callback, "_latest_update_step"):
        callback._latest_update_step, callback._latest_update_epoch = 0, -1


def start_average(callback: Any, model: Any, device: Any) -> None:
    """Gives a ``WeightAveraging`` an average of ``model``, by its own settings."""
    callback._average_model = AveragedModel(
        model=model,
        device=callback._device or device,
        use_buffers=callback._use_buffers,
        **callback._kwargs,
    )


def quiet_exit(root: str) -> Exception:
    """Returns the exception that ends a fit without an error."""
    error: Exception = import_module(f"{root}.utilities.exceptions")._TunerExitException()
    return error


def is_accumulating(loop: Any) -> bool:
    """Returns whether the batch that was trained on last ended without an optimizer step."""
    return bool(loop._should_accumulate())


def is_validation_due(fit: Any) -> bool:
    """Returns whether the loop over batches validates next."""
    return bool(fit.epoch_loop._should_check_val_fx(fit._data_fetcher))


def ends_epoch(epoch: Any) -> bool:
    """Returns whether the batch that was begun is the last one of the epoch."""
    return bool(epoch._num_ready_batches_reached())


def ends_fit(trainer: Any) -> bool:
    """Returns whether training ends with the batch that was begun, by steps or epochs."""
    last_epoch = trainer.max_epochs != -1 and trainer.current_epoch + 1 >= trainer.max_epochs
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return bool(by_steps or (last_epoch and ends_epoch(trainer.fit_loop.epoch_loop)))


def forget_groups(callback: Any) -> None:
    """Lets a finetuning callback record the groups of new optimizers, not behind the old ones."""
    callback._internal_optimizer_metadata = {}


def logged_metrics(epoch: Any) -> Any:
    """Returns the logged values of an epoch with their reductions, by name."""
    return epoch._results


def forget_computed(metric: Any) -> None:
    """Lets a logged metric be computed again."""
    metric._computed = None


def callback_metrics(trainer: Any) -> dict[str, Any]:
    """Returns the metrics of callbacks and schedulers, to be changed.

    Public alternative: ``trainer.callback_metrics``, a copy, which computes metrics first.
    """
    metrics: dict[str, Any] = trainer._logger_connector._callback_metrics
    return metrics


def data_fetcher(fit: Any) -> Any:
    """Returns the data fetcher of a fit, or ``None``."""
    return fit._data_fetcher


def fetches_batches(fetcher: Any) -> bool:
    """Returns whether a data fetcher gives ``training_step`` batches, and not an iterator."""
    return type(fetcher).__name__ != "_DataLoaderIterDataFetcher"


def combined_loader(loop: Any) -> Any:
    """Returns the ``CombinedLoader`` of a fit or validation, or ``None``."""
    return loop._combined_loader


def training_data(trainer: Any) -> Any:
    """Returns the training data of a fit, from its hook or argument, before it is set up."""
    return trainer.fit_loop._data_source.dataloader()


def reloads_training_data(fit: Any) -> bool:
    """Returns whether ``setup_data`` requests the loaders again."""
    return bool(fit._should_reload_train_dl)


def drop_loaders(fit: Any) -> None:
    """Lets a fit ask for its training loaders again; workers of those that it has are ended."""
    fit._data_fetcher.teardown()
    fit._combined_loader = None


def loader_states(fit: Any) -> list[Any]:
    """Returns the states of stateful loaders that are to be restored."""
    states: list[Any] = fit._combined_loader_states_to_load
    return states


def restore_loader_states(fit: Any, states: list[Any] | None = None) -> None:
    """Restores the states of stateful loaders: ``states``, or those of the checkpoint."""
    if states is not None:
        fit._combined_loader_states_to_load = states
    getattr(type(fit), LOAD_LOADER_STATES)(fit)


def end_restart(loop: Any) -> None:
    """Lets a loop run as one that does not resume; ``restarting`` has more effects when set."""
    loop._restarting = False


def config_parser(cli: Any) -> Any:
    """Returns the parser of the subcommand of a LightningCLI."""
    return cli._parser(cli.subcommand)


def owners_of(module: Any) -> list[Any]:
    """Returns the Trainer and the Fabric that a module belongs to, as far as there are any."""
    owners = (module.__dict__.get(name) for name in ("_trainer", "_fabric"))
    return [owner for owner in owners if owner is not None]


def set_device_of(module: Any, device: Any) -> None:
    """Sets ``module.device`` of a LightningModule or a metric whose tensors were replaced."""
    if isinstance(module.__dict__.get("_device"), type(device)):
        module._device = device


def summary_depth(callback: Any) -> int:
    """Returns how many levels of submodules a ``ModelSummary`` shows; 1 where it is the default."""
    depth: int = callback._max_depth
    return depth


def last_saved_step(checkpoint: Any) -> int:
    """Returns the step at which a ``ModelCheckpoint`` saved last."""
    step: int = checkpoint._last_global_step_saved
    return step


def save_last(checkpoint: Any, trainer: Any, counted: bool = True) -> None:
    """Saves the last checkpoint of a ``ModelCheckpoint`` now.

    Public alternative: ``save_last`` with ``every_n_train_steps``, which counts for the best too.
    """
    before = checkpoint._last_global_step_saved
    checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))
    if not counted:
        checkpoint._last_global_step_saved = before


def is_tuning(trainer: Any, had_callbacks: bool) -> bool:
    """Returns whether a fit is a trial of Lightning's tuner, which takes all callbacks away for it.

    The finder of batch sizes is a callback itself: a fit that began without any has no trials.
    """
    callbacks = trainer.callbacks
    if not callbacks:
        return had_callbacks
    return any(type(one).__name__ == "_LRCallback" for one in callbacks)


def uploads_each(logger: Any, checkpoint: Any) -> bool:
    """Returns whether a logger reads each file of a ``ModelCheckpoint`` as soon as it is saved."""
    chosen = getattr(logger, "_log_model", False)
    return bool(chosen == "all" or (chosen is True and getattr(checkpoint, "save_top_k", 1) == -1))


def averages_models(strategy: Any) -> bool:
    """Whether processes average their weights now and then, and not their gradients each time."""
    return getattr(strategy, "_model_averaging_period", None) is not None


def averages_by_hook(strategy: Any) -> bool:
    """Whether DDP averages gradients by a function of the user."""
    return getattr(strategy, "_ddp_comm_hook", None) is not None


def has_static_graph(strategy: Any) -> bool:
    """Whether DDP assumes that all steps compute the same."""
    return bool(getattr(strategy, "_ddp_kwargs", {}).get("static_graph"))

"""State of an interrupted epoch that Lightning's checkpoints lack.

Metrics that schedulers and callbacks monitor, sums of what is logged for the epoch, gradients that
are being accumulated, and steps of plateau schedulers that come after the checkpoint is written.
What cannot be restored is logged when the run is resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lightning_peft.compat.lightning import (
    callback_metrics,
    ends_epoch,
    forget_computed,
    is_accumulating,
    is_validation_due,
    logged_metrics,
)

log = logging.getLogger(__name__)


class _Loops(Protocol):
    """What is needed here of :class:`lightning_peft.plugin.loops.TrainingLoops`."""

    fit: Any
    epoch: Any
    mid_epoch: bool
    ending_epoch: bool
    training_random: dict[str, Any] | None
    sums: dict[str, Any]


def resumes_mid_epoch(trainer: Any, checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether Lightning continues within a checkpoint's epoch, or with the next one."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    begun = progress["ready"], progress["started"]
    return trainer.max_steps != -1 or any(value != progress["processed"] for value in begun)


def mid_epoch_state(loops: _Loops) -> dict[str, Any]:
    """Returns the state of the current epoch in this process, as tensors and numbers."""
    epoch, trainer = loops.epoch, loops.fit.trainer
    batch = epoch.batch_progress.current
    place = {
        "epoch": trainer.current_epoch,
        "batch": batch.processed,
        "last_batch": epoch.batch_progress.is_last_batch,
        "batch_end": batch.ready == batch.processed > batch.completed,
        "inside_step": batch.ready > batch.processed,
        "epoch_end": loops.ending_epoch,
    }
    validated = epoch.val_loop.batch_progress.is_last_batch
    inside_validation = loops.training_random is not None and not validated
    place["validation_due"] = inside_validation or (
        place["batch_end"] and is_validation_due(loops.fit)
    )
    metrics = _metrics(trainer)
    if loops.training_random is not None and validated and place["last_batch"]:
        # Of the epoch's end, for which no batch will log them again.
        ending = logged_metrics(epoch).metrics(False)["callback"]
        metrics |= {name: value.detach().cpu() for name, value in ending.items()}
    return {
        "place": place,
        "metrics": metrics,
        "sums": {n: _on_cpu(sums) for n, sums in epoch_sums(epoch).items()},
        "gradients": {} if place["inside_step"] else _gradients(loops),
        "plateau": _plateau_steps(loops, place, metrics),
    }


def restore_mid_epoch(loops: _Loops, saved: dict[str, Any]) -> None:
    """Puts back what :func:`mid_epoch_state` returned, or logs what cannot be put back."""
    trainer, place = loops.fit.trainer, saved["place"]
    if trainer.is_global_zero:
        for line in _unrestored_warnings(place, loops.mid_epoch):
            log.warning("%s", line)
    if not (loops.mid_epoch and place["epoch_end"] and place["last_batch"]):
        # There Lightning runs the hooks of the epoch's end again, and they must not count twice.
        device = trainer.strategy.root_device
        metrics = {name: value.to(device) for name, value in saved["metrics"].items()}
        callback_metrics(trainer).update(metrics)
    if loops.mid_epoch and not place["last_batch"]:
        loops.sums = dict(saved["sums"])
        named = dict(trainer.lightning_module.named_parameters())
        for name, gradient in saved["gradients"].items():
            named[name].grad = gradient.to(named[name].device)
    for step in saved["plateau"]:
        scheduler = trainer.lr_scheduler_configs[step["scheduler"]].scheduler
        trainer.lightning_module.lr_scheduler_step(scheduler, step["metric"])


def merge_epoch_sums(loops: _Loops) -> None:
    """Adds what was logged before the checkpoint to what was logged since, metric by metric."""
    for name in [name for name in loops.sums if name in logged_metrics(loops.epoch)]:
        metric = logged_metrics(loops.epoch)[name]
        if metric.has_reset:
            continue
        saved = {key: value.to(metric.value.device) for key, value in loops.sums.pop(name).items()}
        if metric.meta.is_max_reduction or metric.meta.is_min_reduction:
            metric.value = metric.meta.reduce_fx(metric.value, saved["value"])
        else:
            metric.value = saved["value"] + metric.value
        if "weight" in saved:
            metric.cumulated_batch_size = saved["weight"] + metric.cumulated_batch_size
        forget_computed(metric)


def _metrics(trainer: Any) -> dict[str, torch.Tensor]:
    try:
        metrics = trainer.callback_metrics
    except Exception:
        # A checkpoint that is written because of an error must not fail with another one.
        metrics = callback_metrics(trainer)
    return {name: value.detach().cpu() for name, value in metrics.items()}


def _on_cpu(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in values.items()}


def epoch_sums(epoch: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the sums of what is logged for the epoch, which later batches leave as they are."""
    sums = {}
    for name, metric in logged_metrics(epoch).items():
        if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset:
            sums[name] = {"value": metric.value.detach()}
            if metric.meta.is_mean_reduction:
                sums[name]["weight"] = metric.cumulated_batch_size.detach()
    return sums


def put_back_sums(epoch: Any, sums: dict[str, dict[str, torch.Tensor]]) -> None:
    """Forgets what was logged for the epoch since :func:`epoch_sums`."""
    for name, metric in logged_metrics(epoch).items():
        if not metric.is_tensor or not metric.meta.on_epoch:
            continue
        if name not in sums:
            metric.reset()
            continue
        metric.value = sums[name]["value"]
        if "weight" in sums[name]:
            metric.cumulated_batch_size = sums[name]["weight"]
        forget_computed(metric)


def _gradients(loops: _Loops) -> dict[str, torch.Tensor]:
    module, epoch = loops.fit.trainer.lightning_module, loops.epoch
    if module.automatic_optimization and (
        epoch.batch_progress.current.ready == 0 or not is_accumulating(epoch)
    ):
        return {}
    return {
        name: param.grad.detach().cpu()
        for name, param in module.named_parameters()
        if param.grad is not None and not param.grad.is_sparse
    }


def _plateau_steps(
    loops: _Loops, place: dict[str, Any], metrics: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """Returns the steps of plateau schedulers that are due now and not taken on resuming."""
    epoch, trainer = loops.epoch, loops.fit.trainer
    if not trainer.lightning_module.automatic_optimization:
        return []
    ends = place["epoch_end"] and not loops.fit.restarting and ends_epoch(epoch)
    steps = place["batch_end"] and not is_accumulating(epoch)
    if steps and place["validation_due"]:
        # Metrics of the validation that comes first are not known yet.
        known = logged_metrics(epoch).metrics(True)["callback"]
        metrics = {name: value for name, value in metrics.items() if name in known}
    taken = []
    for index, config in enumerate(trainer.lr_scheduler_configs):
        due = ends if config.interval == "epoch" else steps
        count = trainer.current_epoch if config.interval == "epoch" else epoch.batch_idx
        if config.reduce_on_plateau and due and (count + 1) % config.frequency == 0:
            metric = metrics.get(config.monitor)
            if metric is not None:
                taken.append({"scheduler": index, "metric": metric})
    return taken


def _unrestored_warnings(place: dict[str, Any], mid_epoch: bool) -> list[str]:
    epoch, batch = place["epoch"], place["batch"]
    if not mid_epoch:
        if place["last_batch"] or not batch:
            return []
        return [
            f"The run that wrote the checkpoint ended inside epoch {epoch}, after {batch} batches. "
            f"Lightning goes on with the next epoch: the rest of epoch {epoch} is not trained on."
        ]
    if place["inside_step"]:
        return [
            f"The checkpoint was written inside a step: batch {batch} of epoch {epoch} is trained "
            "on again, with other random numbers and without gradients accumulated before it."
        ]
    if place["batch_end"] and place["last_batch"]:
        return [
            f"The checkpoint was written after the last batch of epoch {epoch} and before the "
            "epoch's end. Lightning goes on with the next epoch and does not run what comes "
            "between: validation, on_train_epoch_end and on_train_epoch_start. EarlyStopping, "
            "plateau schedulers and ModelCheckpoint do not count that epoch. Checkpoints of an "
            "epoch's end (every_n_epochs) have it all."
        ]
    if place["validation_due"]:
        return [
            f"The checkpoint was written before the end of the validation after batch {batch} of "
            f"epoch {epoch}, which Lightning does not run again: EarlyStopping, plateau schedulers "
            "and ModelCheckpoint do not count it. Training goes on as it would have."
        ]
    return []

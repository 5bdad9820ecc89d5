"""What came out of a run: one record that tables and other programs are made of."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lightning_peft import engine
from lightning_peft.runs.machine import hardware, peak_memory, versions
from lightning_peft.runs.provenance import digest_of

if TYPE_CHECKING:
    from lightning_peft.runs.recorder import RunRecorder


def result(
    recorder: RunRecorder, trainer: Any, module: Any, after: dict[str, float]
) -> dict[str, Any]:
    """Returns the record of a finished run, ready for JSON.

    Args:
        recorder: What kept the run's folder.
        trainer: Its Trainer.
        module: Its LightningModule.
        after: Metrics after it.
    """
    cls = getattr(type(module), "written_class", type(module))
    trained = [param for param in module.parameters() if param.requires_grad]
    checkpoint = best_checkpoint(trainer)
    return {
        "run": recorder.folder.path.name,
        "kind": recorder.kind,
        "task": cls.__name__,
        "method": method_of(module),
        "model": module.hparams.get("model"),
        "before": recorder.before,
        "after": after,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "rows": recorder.pace.rows,
        "tokens": recorder.pace.tokens,
        "seconds": round(time.time() - recorder.started, 1),
        "trainable_parameters": sum(param.numel() for param in trained),
        "peak_memory": peak_memory(),
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
        "seed": recorder.seed,
        "checkpoint": checkpoint and str(checkpoint),
        "recipe_sha256": digest_of(recorder.recipe),
        "versions": versions(),
        "hardware": hardware(),
    }


def best_checkpoint(trainer: Any) -> str | None:
    """Returns the checkpoint that a run recommends: the best one, else the last."""
    callback = trainer.checkpoint_callback
    if callback is None:
        return None
    return callback.best_model_path or getattr(callback, "last_model_path", "") or None


def method_of(module: Any) -> str:
    """Returns ``"qlora"``, ``"lora"`` (or PEFT's name of another method), or ``"full"``."""
    record = engine.record_of(module)
    if record is None:
        return "full"
    parts = record.parts.values()
    if any(part.quantization for part in parts):
        return "qlora"
    kinds = {info.config["peft_type"] for part in parts for info in part.adapters.values()}
    return "+".join(sorted(str(kind).lower() for kind in kinds))

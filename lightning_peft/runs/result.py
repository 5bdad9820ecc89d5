"""What came out of a run: one record that tables and other programs are made of."""

from __future__ import annotations

from typing import Any

from lightning_peft import engine
from lightning_peft.runs.machine import hardware, peak_memory, versions


def result(trainer: Any, module: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a finished run, ready for JSON.

    Args:
        trainer: Its Trainer.
        module: Its LightningModule.
        known: What whoever kept the record knows: name, kind, metrics before and after, seconds.
    """
    cls = getattr(type(module), "unbound_class", type(module))
    trained = [param for param in module.parameters() if param.requires_grad]
    return {
        **known,
        "task": cls.__name__,
        "method": method_of(module),
        "model": module.hparams.get("model"),
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "trainable_parameters": sum(param.numel() for param in trained),
        "peak_memory": peak_memory(),
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
        "checkpoint": best_checkpoint(trainer),
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

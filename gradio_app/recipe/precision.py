"""The default precision of a training, and the reason for it."""

from __future__ import annotations

from dataclasses import dataclass

from gradio_app.runs.bfloat16 import Kind
from lightning_peft.task_registry import TASKS

# The family of tasks whose activations overflow float16: those of T5 do.
_NO_FLOAT16 = "seq2seq"
_BY_KIND: dict[Kind, str] = {
    "gpu": "bf16-mixed",
    "cpu": "bf16-mixed",
    "unknown": "bf16-mixed",
    "old_gpu": "16-mixed",
    "old_cpu": "32-true",
}


@dataclass(frozen=True)
class Precision:
    """The default, from which the form takes both the value and the help.

    Attributes:
        value: As ``Trainer(precision=...)`` takes it.
        reason: Of its text: ``fields.precision_REASON``.
    """

    value: str
    reason: str


def default_precision(task: str, tiny: bool, kind: Kind) -> Precision:
    """Returns the default."""
    if tiny:
        return Precision("32-true", "tiny")
    if kind == "old_gpu" and task in TASKS and TASKS[task].family == _NO_FLOAT16:
        return Precision("32-true", "no_float16")
    return Precision(_BY_KIND[kind], kind)

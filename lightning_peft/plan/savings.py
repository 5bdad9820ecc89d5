"""Changes to a run that take less memory, and what each of them saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_peft.errors import LightningPeftError
from lightning_peft.plan.device_memory import readable
from lightning_peft.plan.prediction import Prediction, predict
from lightning_peft.plan.settings import Settings
from lightning_peft.plan.sources import Source
from lightning_peft.plan.trace import Step

_SHORTEST = 32


@dataclass(frozen=True)
class Change:
    """One change to a run.

    Attributes:
        words: What to change, with the argument's name.
        settings: The run after it.
        saved: Predicted bytes that it saves.
        needed: The upper end of what the run takes after it.
    """

    words: str
    settings: Settings
    saved: int
    needed: int

    def line(self, device_bytes: int) -> str:
        """Returns the change as a sentence."""
        enough = "then it fits" if self.needed <= device_bytes else "not enough alone"
        return f"{self.words}: saves about {readable(self.saved)}, {enough}"


def best_changes(
    source: Source,
    plan: Prediction,
    device_bytes: int,
    step: Step | None = None,
    count: int = 3,
) -> list[Change]:
    """Returns the changes that help most: those that fit come first, in the order of their cost.

    What costs least is first: checkpointing, then a smaller batch with more accumulation, which
    train the same; then a base in 4 bits; then shorter sequences, which lose data.

    Args:
        source: The model.
        plan: The run that does not fit.
        device_bytes: Memory of the device.
        step: As for :func:`lightning_peft.plan.prediction.plan_memory`.
        count: How many at most.
    """
    found = []
    for words, settings in _candidates(source, plan.settings):
        try:
            after = predict(source, settings, step)
        except LightningPeftError:
            # Such as checkpointing in a module where nothing repeats.
            continue
        saved = plan.peak_bytes - after.peak_bytes
        if saved > 0:
            found.append(Change(words, settings, saved, after.high_bytes))
    fitting = [change for change in found if change.needed <= device_bytes]
    rest = sorted((c for c in found if c not in fitting), key=lambda change: -change.saved)
    return [*fitting, *rest][:count]


def _candidates(source: Source, run: Settings) -> Iterator[tuple[str, Settings]]:
    if not run.checkpointing:
        yield "gradient_checkpointing=True", replace(run, gradient_checkpointing=True)
    if source.rows_change and run.batch_size > 1:
        rows = run.batch_size
        for smaller in dict.fromkeys((rows // 2, 1)):
            times = -(-rows // smaller) * run.accumulate
            yield (
                f"batch_size={smaller} with accumulate_grad_batches={times}",
                replace(run, batch_size=smaller, accumulate=times),
            )
    if run.method == "full":
        yield "LoRA instead of training all weights", replace(run, method="lora")
    if run.method != "qlora":
        yield "QLoRA (a base in 4 bits)", replace(run, method="qlora")
    if not run.optimizer_name.endswith("8bit"):
        yield "optimizer='paged_adamw_8bit'", replace(run, optimizer="paged_adamw_8bit")
    if source.length_changes and run.seq_len >= 2 * _SHORTEST:
        half, quarter = run.seq_len // 2, run.seq_len // 4
        for shorter in (half, quarter):
            if shorter >= _SHORTEST:
                yield f"sequences of {shorter} tokens", replace(run, seq_len=shorter)

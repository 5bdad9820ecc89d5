"""Measured effect of merging on outputs.

Weights are those of each way; everything is computed in float32, so that nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lightning_peft import engine
from lightning_peft.engine.methods.lora_config import quantizes_another_base
from lightning_peft.errors import LightningPeftError, first_line
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base
from lightning_peft.export.loading import (
    dtype_in_training,
    load_as_trained,
    load_model,
    load_tokenizer,
)

# A question, prose and code: what tuned models are asked.
PROMPTS = (
    "What is the difference between a list and a tuple?",
    "The report was late again, and this time nobody in the office was surprised, because",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Write a short letter to a friend who has moved to another city.",
)
_LONGEST = 256
Result = TypeVar("Result")


@dataclass
class LogitError:
    """How far the outputs of one way of merging are from the model as it was trained.

    ``relative`` is ``||logits - trained|| / ||trained||`` over all tokens of the prompts, ``kl``
    the mean Kullback-Leibler divergence per token in nats, trained against merged, and
    ``same_choice`` the share of tokens after which both would choose the same next one.
    """

    relative: float
    kl: float
    same_choice: float


def unmeasurable_reason(adapter: Adapter, base: Base) -> str | None:
    """Returns why outputs cannot be compared here, or ``None`` where they can."""
    # The weights and what is computed with them, in float32.
    needed = 2 * 4 * sum(stored.numel for stored in base.keys.values())
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            f"comparing outputs takes about {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free"
        )
    fields = adapter.facts.get("config") or {}
    if adapter.quantization is not None and quantizes_another_base(fields):
        init = fields["init_lora_weights"]
        return f"with init_lora_weights={init!r} the folder does not hold the base in training"
    return None


def measure_merge(
    adapter: Adapter,
    base: Base,
    merged: Path,
    into: str,
    dtype: torch.dtype,
    prompts: Sequence[str] = PROMPTS,
    *,
    check_base: bool = True,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, LogitError]:
    """Returns the error in the logits of each way of merging, by its name.

    The way that was chosen, ``into``, is measured on the folder that was written; of the others,
    models are made in memory, one at a time, with weights stored in ``dtype``.
    """
    tokenizer = load_tokenizer(base)
    settings, errors = adapter.quantization, {}
    steps = 2 if settings is None else 4
    progress("comparing outputs", 0, steps)
    trained = load_as_trained(base, adapter, check_base=check_base)
    reference = logits_of(trained, tokenizer, prompts)
    progress("comparing outputs", 1, steps)
    if settings is not None:
        (entry,) = engine.require_record(trained).parts.values()
        quantized = list(entry.quantized)
        _as_stored(trained, dtype)
        if into != "dequantized":
            errors["dequantized"] = compare(logits_of(trained, tokenizer, prompts), reference)
        # Layers that were merged in training are dense by now.
        if not adapter.merged_layers:
            with engine.exposed_experts(trained):
                for name in quantized:
                    engine.quantize(trained.get_submodule(name), settings)
            errors["requantized"] = compare(logits_of(trained, tokenizer, prompts), reference)
        progress("comparing outputs", 2, steps)
        del trained
        if into != "original":
            dense = load_model(base, adapter, dtype_in_training(adapter))
            engine.load_adapter(dense, adapter.folder, check_base=check_base)
            _as_stored(dense, dtype)
            errors["original"] = compare(logits_of(dense, tokenizer, prompts), reference)
            del dense
        progress("comparing outputs", 3, steps)
    cls: Any = getattr(transformers, base.config.architectures[0])
    written = cls.from_pretrained(merged, dtype=torch.float32).eval()
    errors[into] = compare(logits_of(written, tokenizer, prompts), reference)
    progress("comparing outputs", steps, steps)
    return errors


def _as_stored(model: Any, dtype: torch.dtype) -> None:
    engine.merge(model, dtype=dtype)
    engine.unload(model)
    model.to(dtype)


@torch.no_grad()
def logits_of(model: Any, tokenizer: Any, prompts: Sequence[str] | None = None) -> Tensor:
    """Returns the logits after each token of texts; dense weights of ``model`` become float32."""
    if getattr(model, "hf_quantizer", None) is None:
        model.float()
    logits_per_prompt = []
    for text in prompts or PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :_LONGEST]
        output = model(input_ids=ids.to(model.device))
        logits = getattr(output, "logits", output[0])
        logits_per_prompt.append(logits.float().cpu().reshape(-1, logits.shape[-1]))
    return torch.cat(logits_per_prompt)


def compare(actual: Tensor, expected: Tensor) -> LogitError:
    """Returns how far the logits ``actual`` are from ``expected``."""
    kl = F.kl_div(
        actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum"
    )
    same = (actual.argmax(-1) == expected.argmax(-1)).float().mean()
    return LogitError(
        relative=((actual - expected).norm() / expected.norm()).item(),
        # Rounding can make the sum of tiny terms negative.
        kl=max(0.0, kl.item() / len(actual)),
        same_choice=same.item(),
    )


def measured_model(
    adapter: Adapter,
    base: Base,
    load: Callable[[], Any],
    options: Mapping[str, Any],
    reason: str | None = None,
) -> tuple[LogitError | None, str | None]:
    """Returns how far the model that ``load`` reads is from the one in training, or why not.

    ``options`` are those of merging, ``reason`` says what stands against it.
    """
    if not options.get("measure", True):
        return None, "it was not asked for"
    if reason is not None:
        return None, reason
    progress = options.get("progress", lambda what, done, total: None)

    def compared() -> LogitError:
        progress("comparing outputs", 0, 2)
        tokenizer, prompts = load_tokenizer(base), options.get("prompts")
        trained = load_as_trained(base, adapter, check_base=options.get("check_base", True))
        reference = logits_of(trained, tokenizer, prompts)
        del trained
        progress("comparing outputs", 1, 2)
        error = compare(logits_of(load().eval(), tokenizer, prompts), reference)
        progress("comparing outputs", 2, 2)
        return error

    return measured(adapter, base, compared)


def measured(
    adapter: Adapter, base: Base, measure: Callable[[], Result]
) -> tuple[Result | None, str | None]:
    """Returns the result of a comparison of outputs, or ``None`` and why there is none.

    The folder is complete at this point: nothing that goes wrong here may lose it.
    """
    reason = unmeasurable_reason(adapter, base)
    if reason is not None:
        return None, reason
    try:
        return measure(), None
    except (LightningPeftError, OSError, RuntimeError, ValueError) as error:
        return None, f"{type(error).__name__}: {first_line(error)}"

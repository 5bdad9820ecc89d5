"""Generation with adapters, for chat, comparison, samples, rollouts and benchmarks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lightning_peft import engine
from lightning_peft.compat.transformers import is_recurrent
from lightning_peft.data.batching import pad_left
from lightning_peft.plan.device_memory import free_memory, readable

log = logging.getLogger(__name__)

# Prompts that are generated for at the same time.
BATCH_SIZE = 16
# Of the free memory, what copies of weights may take.
SHARE_OF_FREE_MEMORY = 0.5


@contextmanager
def ready(model: nn.Module, say: Callable[[str], None] = log.info) -> Iterator[None]:
    """Within the body, ``model`` generates: eval mode, no gradients, nothing computed twice.

    Adapters must not change meanwhile. What is stored is only read.
    """
    with torch.no_grad(), engine.in_eval_mode(model), kept_ready(model, say):
        yield


@contextmanager
def kept_ready(model: nn.Module, say: Callable[[str], None] = log.info) -> Iterator[None]:
    """Within the body, layers of ``model`` are ready for inference; its modes are as they are.

    Weights are copied, quantized ones dequantized, where the copies take at most half of what is
    free; ``say`` takes a line on that.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    cast = torch.is_autocast_enabled(device.type)
    size = engine.inference_bytes(model, torch.get_autocast_dtype(device.type) if cast else None)
    free = free_memory(device) if size else 0
    fits = size <= SHARE_OF_FREE_MEMORY * free
    if size:
        amounts = f"{readable(size)} of {readable(free)} free memory"
        say(
            f"For generation, weights are dequantized and laid out once: {amounts}."
            if fits
            else "For generation, weights are read as they are stored, which is slower: to "
            f"dequantize and lay them out once would take {amounts}, and at most half is used."
        )
    with engine.ready_for_inference(model, fits):
        yield


@contextmanager
def without_settings_of_base(model: Any) -> Iterator[None]:
    """Leaves out the generation config of the base, which fills in what is not given.

    End tokens that it names have to be given then.
    """
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Returns the output of ``model.generate``, tokens of shape ``(batch, length)``; greedy.

    Those of a causal model begin with the prompt. The modes of the model are as before; ``inputs``
    may be on any device, and ``options`` may ask for sampling.
    """
    # A config says all of it.
    greedy = {} if "generation_config" in options else {"do_sample": False, "num_beams": 1}
    with ready(model):
        tokens: Tensor = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            **{**greedy, **options},
        )
    return tokens


def continuations(
    model: Any,
    prompts: Sequence[list[int]],
    pad_token_id: int,
    most: int = BATCH_SIZE,
    **options: Any,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, ``most`` prompts at the same time.

    Those that ended before others are padded; ``options`` are those of :func:`generate`.
    """
    found: dict[int, list[int]] = {}
    with ready(model):
        for places in generation_batches(model, prompts, most):
            inputs = pad_left([prompts[place] for place in places], pad_token_id)
            tokens = generate(model, inputs, pad_token_id=pad_token_id, **options)
            new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
            found |= dict(zip(places, new, strict=True))
    return [found[place] for place in range(len(prompts))]


def generation_batches(
    model: Any, prompts: Sequence[list[int]], most: int = BATCH_SIZE
) -> list[list[int]]:
    """Returns places of ``prompts``, near lengths together, ``most`` in a batch.

    Padding in front shifts the positions of models that take none, and enters the state of
    recurrent ones: their batches have prompts of one length.
    """
    padded = "position_ids" in inspect.signature(model.forward).parameters and not is_recurrent(
        model
    )
    batches: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: len(prompts[place])):
        last = batches[-1] if batches else []
        same = last and (padded or len(prompts[last[0]]) == len(prompts[place]))
        if same and len(last) < most:
            last.append(place)
        else:
            batches.append([place])
    return batches

"""Packing: several examples in one row, computed exactly as if each were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from lightning_peft import engine
from lightning_peft.compat.torch import is_traced
from lightning_peft.compat.transformers import attention_implementation
from lightning_peft.data.encoding import IGNORED
from lightning_peft.errors import UnsupportedError

# These add a mask of any form to the attention scores; the others take causal masks only.
ATTENTIONS = ("sdpa", "eager")


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the places of the examples of each row.

    A row holds the longest example that is left and, of all sums of others, those that fill it
    best, long ones first. Rows of like content follow each other.

    ``lengths`` are at most ``capacity``, both in tokens.
    """
    places: dict[int, list[int]] = {}
    for place in range(len(lengths) - 1, -1, -1):
        places.setdefault(lengths[place], []).append(place)
    left = {length: len(places[length]) for length in sorted(places, reverse=True)}
    rows: list[list[int]] = []
    while left:
        pattern = _best_fill(left, capacity)
        # As often as there are examples for it: the next best one is about as good, and searched.
        for _ in range(min(left[length] // times for length, times in pattern.items())):
            rows.append([places[n].pop() for n, times in pattern.items() for _ in range(times)])
        left = {length: len(places[length]) for length in left if places[length]}
    return rows


def _best_fill(left: dict[int, int], capacity: int) -> dict[int, int]:
    """Returns how many examples of each length go together into a row.

    ``left`` has how many there are of each length, the longest first.
    """
    longest = next(iter(left))
    room = capacity - longest
    everything = (1 << (room + 1)) - 1
    # Bit n of a set of sums: some of the examples so far have n tokens together.
    sums = [1]
    parts: list[tuple[int, int]] = []
    for length, count in left.items():
        most = min(count - (length == longest), room // length if length else 0)
        times = 1
        while most > 0:
            times = min(times, most)
            parts.append((length, times))
            sums.append((sums[-1] | sums[-1] << length * times) & everything)
            most, times = most - times, 2 * times
    best = sums[-1].bit_length() - 1
    pattern = {longest: 1}
    for i in range(len(parts) - 1, -1, -1):
        length, times = parts[i]
        # Long ones first: what short ones can do, they can do later too.
        if not sums[i] >> best & 1:
            best -= length * times
            pattern[length] = pattern.get(length, 0) + times
    return pattern


class PackedRows(Dataset[list[dict[str, Any]]]):
    """Examples as packed rows, each a list of examples with ``input_ids`` and ``labels``."""

    def __init__(self, examples: Any, lengths: Sequence[int], capacity: int) -> None:
        self.examples = examples
        self.rows = plan_rows(lengths, capacity)
        self.tokens = sum(lengths)
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.examples[place] for place in self.rows[index]]

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens."""
        return self.tokens / (len(self.rows) * self.capacity)


def collate(rows: Sequence[Sequence[dict[str, Any]]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of packed rows, each a list of examples.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each ``(batch, length)``, int64; positions
        start again with each example. ``attention_mask`` is a
        :class:`~lightning_peft.engine.training.packed_attention.PackedMask` of shape
        ``(batch, 1, length, length)``, float32, which is added to the scores: 0 where an example
        attends to its own past, else ``-inf``. It has no storage, and its values are made for
        attention that asks for them.
    """
    length = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    lengths: list[list[int]] = []
    for i, row in enumerate(rows):
        start = 0
        lengths.append([len(example["input_ids"]) for example in row])
        for example, size in zip(row, lengths[i], strict=True):
            stop = start + size
            ids[i, start:stop] = torch.as_tensor(example["input_ids"])
            labels[i, start:stop] = torch.as_tensor(example["labels"])
            # Otherwise the last token of the example before would learn to predict it.
            labels[i, start] = IGNORED
            positions[i, start:stop] = torch.arange(size)
            start = stop
        if start < length:
            positions[i, start:] = torch.arange(length - start)
            lengths[i].append(length - start)
    mask = engine.PackedMask(lengths)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def language_model(module: nn.Module) -> PreTrainedModel:
    """Returns the transformers model inside ``module``.

    Raises:
        UnsupportedError: If there is none, so that nothing is known about its attention.
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UnsupportedError(
        f"packing=True needs a transformers model inside {type(module).__name__}, whose attention "
        "can keep examples apart. Use packing=False, with length_grouping=True against "
        "padding."
    )


def check_model(model: PreTrainedModel, capacity: int) -> None:
    """Tries whether ``model`` keeps packed examples apart.

    Runs it on a row of two short examples, without gradients: the second must not depend on the
    first, and must come out as if it were alone.

    Raises:
        UnsupportedError: If it does not.
    """
    config = model.config.get_text_config()
    kind = attention_implementation(config)
    if kind not in ATTENTIONS:
        raise UnsupportedError(
            f"packing=True needs attention that takes a mask of any form, and "
            f"{type(model).__name__} was loaded with attn_implementation={kind!r}. Load it with "
            f"{' or '.join(map(repr, ATTENTIONS))}, or use packing=False."
        )
    if not sees_all(model, capacity):
        window = config.sliding_window
        raise UnsupportedError(
            f"{type(model).__name__} attends to the last {window:,} tokens only, which the mask of "
            f"packed rows of {capacity:,} tokens would undo. Use max_length={window} or less, or "
            "packing=False."
        )
    try:
        with engine.in_eval_mode(model), torch.no_grad():
            leak, shift = _measure_leakage(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot run packed rows: {error}. Use packing=False, with "
            "length_grouping=True against padding."
        ) from error
    if leak > 1e-3 or shift > 0.05:
        what = "see each other" if leak > 1e-3 else "are not computed as if alone"
        raise UnsupportedError(
            f"Packed examples {what} in {type(model).__name__}: on a trial row the outputs of the "
            f"second changed by {max(leak, shift):.1%} of their size. It does not follow the mask "
            "or position_ids in some layer (recurrent layers cannot). Use packing=False, with "
            "length_grouping=True against padding."
        )


def sees_all(model: PreTrainedModel, length: int) -> bool:
    """Whether every token of an example of ``length`` tokens attends to all before it."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window)
    return not window or window >= length or "sliding_attention" not in layers


def _measure_leakage(model: PreTrainedModel) -> tuple[float, float]:
    size = min(100, int(model.config.get_text_config().vocab_size))
    first, second = torch.arange(6) % size, (torch.arange(9) * 7 + 3) % size

    def row(*examples: Tensor) -> Tensor:
        plain = [{"input_ids": e.tolist(), "labels": e.tolist()} for e in examples]
        batch = to_model(collate([plain], 0), model)
        del batch["labels"]
        out: Tensor = model(**{k: v.to(model.device) for k, v in batch.items()}).logits
        return out[0, -len(second) :].float()

    packed, other = row(first, second), row((first + 5) % size, second)
    scale = packed.norm().clamp_min(1e-12)
    alone = model(input_ids=second[None].to(model.device)).logits[0].float()
    return float((packed - other).norm() / scale), float((packed - alone).norm() / scale)


def to_model(
    batch: dict[str, Tensor], model: PreTrainedModel, whole: nn.Module | None = None
) -> dict[str, Tensor]:
    """Returns ``batch`` with its mask in the dtype of ``model``: sdpa takes no other.

    With values, where ``torch.compile`` traces the model or what is around it, ``whole``: it knows
    no masks without storage.
    """
    mask = batch["attention_mask"].to(model.dtype)
    if isinstance(mask, engine.PackedMask) and is_traced(whole or model):
        mask = mask.dense()
    return {**batch, "attention_mask": mask}

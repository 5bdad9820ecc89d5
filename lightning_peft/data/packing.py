"""Packing: several examples in one row, computed exactly as if each were alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from lightning_peft import engine
from lightning_peft.compat.transformers import attention_implementation
from lightning_peft.data.encoding import IGNORED
from lightning_peft.errors import UnsupportedError

# These add a mask of any form to the attention scores; the others take causal masks only.
ATTENTIONS = ("sdpa", "eager")


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the places of the examples of each row: best fit, longest first.

    ``lengths`` are at most ``capacity``, both in tokens.
    """
    rows: list[list[int]] = []
    # Room left -> rows with that room. There are at most ``capacity`` different values.
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[place]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                del rooms[at]
        rows[row].append(place)
        left = room - length
        if left not in open_rows:
            insort(rooms, left)
        open_rows.setdefault(left, []).append(row)
    return rows


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
        start again with each example. ``attention_mask`` of shape ``(batch, 1, length, length)``,
        float32, is added to the scores: 0 where an example attends to its own past, else ``-inf``.
    """
    length = max(sum(len(example["input_ids"]) for example in row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    example_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        start = 0
        for owner, example in enumerate(row, start=1):
            stop = start + len(example["input_ids"])
            ids[i, start:stop] = torch.as_tensor(example["input_ids"])
            labels[i, start:stop] = torch.as_tensor(example["labels"])
            # Otherwise the last token of the example before would learn to predict it.
            labels[i, start] = IGNORED
            positions[i, start:stop] = torch.arange(stop - start)
            example_ids[i, start:stop] = owner
            start = stop
        positions[i, start:] = torch.arange(length - start)
    mask = block_causal_mask(example_ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def block_causal_mask(example_ids: Tensor) -> Tensor:
    """Returns the mask, ``(batch, 1, length, length)``, float32: 0 in a token's own past, or -inf.

    ``example_ids`` is the number of the example of each token, ``(batch, length)``.
    """
    length = example_ids.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=example_ids.device).tril()
    allowed = (example_ids[:, None, :, None] == example_ids[:, None, None, :]) & past
    mask = torch.zeros(allowed.shape, device=example_ids.device)
    return mask.masked_fill_(~allowed, float("-inf"))


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
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"] * bool(window)
    if window and window < capacity and "sliding_attention" in layers:
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


def to_model(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns ``batch`` with its mask in the dtype of ``model``: sdpa takes no other."""
    return {**batch, "attention_mask": batch["attention_mask"].to(model.dtype)}

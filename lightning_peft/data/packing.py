"""Packing: several examples per row, with the results of unpacked rows."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate
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
# Lengths that may join the longest example of a row: so many of the longest that fit, and of the
# shortest. Steps of the search for all rows, each of a microsecond or less.
MOST_SIZES, MOST_STEPS = 64, 2_000_000


class PackedRows(Dataset[list[dict[str, Any]]]):
    """Examples as packed rows, each a list of examples with ``input_ids`` and ``labels``."""

    def __init__(self, examples: Any, lengths: Sequence[int], capacity: int) -> None:
        self.examples = examples
        rows = plan_rows(lengths, capacity)
        # Not as lists, of which each worker of a loader would come to hold a copy.
        self._places = torch.tensor([place for row in rows for place in row], dtype=torch.int64)
        self._starts = torch.tensor([0, *accumulate(map(len, rows))])
        self.tokens = sum(lengths)
        self.capacity = capacity

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        row = range(len(self))[index]
        first, last = self._starts[row : row + 2].tolist()
        return [self.examples[place] for place in self._places[first:last].tolist()]

    @property
    def efficiency(self) -> float:
        """Share of the rows' capacity that holds tokens."""
        return self.tokens / (len(self) * self.capacity)


def collate(rows: Sequence[Sequence[dict[str, Any]]], pad_token_id: int) -> dict[str, Tensor]:
    """Returns a batch of packed rows, each a list of examples.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each ``(batch, length)``, int64; positions
        start again with each example. ``attention_mask`` is a
        :class:`~lightning_peft.engine.training.packed_attention.PackedMask` of shape
        ``(batch, 1, length, length)``, float32, which is added to the scores: 0 where an example
        attends to its own past, else ``-inf``. It has no storage, and its values are made for
        attention that requests them.
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
    """Returns the transformers model inside ``module``; without one, its attention is not known."""
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UnsupportedError(
        f"packing=True needs a transformers model inside {type(module).__name__}, whose attention "
        "can keep examples apart. Use packing=False, with length_grouping=True against "
        "padding."
    )


def check_model(model: PreTrainedModel, capacity: int) -> None:
    """Refuses a model that does not keep packed examples apart.

    It is run on a row of two short examples, without gradients: the second must not depend on the
    first, and must come out as if it were alone.
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
    except Exception as error:
        # Models read masks in their own ways, and fail in as many; nothing was changed.
        raise UnsupportedError(
            f"{type(model).__name__} cannot run packed rows: {error}. Use packing=False, with "
            "length_grouping=True against padding."
        ) from error
    # A mask hides all of an example; rounding may differ, in a mixture of experts for instance.
    leaks = leak > min(1e-3, 100 * torch.finfo(model.dtype).eps)
    if leaks or shift > 0.05:
        what = "see each other" if leaks else "are not computed as if alone"
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


def makes_mask(model: PreTrainedModel) -> bool:
    """Whether attention requests the mask of length squared, in the mode that ``model`` is in."""
    batch = _trial_row(model, *_trial_examples(_trial_size(model)))
    with torch.no_grad(), torch.random.fork_rng([]):
        model(**batch)
    mask = batch["attention_mask"]
    return not isinstance(mask, engine.PackedMask) or mask.has_values


def _trial_size(model: PreTrainedModel) -> int:
    return min(100, int(model.config.get_text_config().vocab_size))


def _trial_examples(size: int) -> tuple[Tensor, Tensor]:
    return torch.arange(6) % size, (torch.arange(9) * 7 + 3) % size


def _trial_row(model: PreTrainedModel, *examples: Tensor) -> dict[str, Tensor]:
    plain = [{"input_ids": example, "labels": example} for example in examples]
    batch = to_model(collate([plain], 0), model)
    del batch["labels"]
    return {name: value.to(model.device) for name, value in batch.items()}


def _measure_leakage(model: PreTrainedModel) -> tuple[float, float]:
    size = _trial_size(model)
    first, second = _trial_examples(size)

    def row(*examples: Tensor) -> Tensor:
        out: Tensor = model(**_trial_row(model, *examples)).logits
        return out[0, -len(second) :].float()

    packed, other = row(first, second), row((first + 5) % size, second)
    scale = packed.norm().clamp_min(1e-12)
    alone = model(input_ids=second[None].to(model.device)).logits[0].float()
    return float((packed - other).norm() / scale), float((packed - alone).norm() / scale)


def to_model(
    batch: dict[str, Tensor], model: PreTrainedModel, whole: nn.Module | None = None
) -> dict[str, Tensor]:
    """Returns ``batch`` with its mask in the dtype of ``model``: sdpa takes no other.

    With values, where ``torch.compile`` traces it or ``whole``: it knows no masks without storage.
    """
    mask = batch["attention_mask"].to(model.dtype)
    if isinstance(mask, engine.PackedMask) and is_traced(whole or model):
        mask = mask.dense()
    return {**batch, "attention_mask": mask}


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the places of the examples of each row, in as few rows as two ways find.

    One is best fit, the longest first. In the other, a row holds the longest example that is left
    and, of the sums of others that were looked at, those that fill it best, long ones first; rows
    of like content follow each other. Of more examples than can be searched, it is best fit.

    ``lengths`` are at most ``capacity``, both in tokens.
    """
    fitted, searched = _fit_rows(lengths, capacity), _search_rows(lengths, capacity)
    return fitted if searched is None or len(fitted) < len(searched) else searched


def _fit_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns rows by best fit: the longest example first, each into the fullest row for it."""
    rows: list[list[int]] = []
    # Rows by the space that is left in them, and those spaces, the least first.
    by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect_left(spaces, lengths[place])
        if at < len(spaces):
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        else:
            space, row = capacity, []
            rows.append(row)
        row.append(place)
        space -= lengths[place]
        if space not in by_space:
            by_space[space] = []
            insort(spaces, space)
        by_space[space].append(row)
    return rows


def _search_rows(lengths: Sequence[int], capacity: int) -> list[list[int]] | None:
    """Returns rows by a search for each, or ``None`` where that would take long."""
    places: dict[int, list[int]] = {}
    for place in range(len(lengths) - 1, -1, -1):
        places.setdefault(lengths[place], []).append(place)
    left, sizes = {length: len(those) for length, those in places.items()}, sorted(places)
    rows: list[list[int]] = []
    steps = 0
    while sizes:
        pattern, taken = _best_fill(left, sizes, capacity)
        steps += taken
        if steps > MOST_STEPS:
            return None
        # As often as there are examples for it: the next best one is about as good, and searched.
        for _ in range(min(left[length] // times for length, times in pattern.items())):
            rows.append([places[n].pop() for n, times in pattern.items() for _ in range(times)])
        for length in pattern:
            left[length] = len(places[length])
            if not left[length]:
                del sizes[bisect_left(sizes, length)]
    return rows


def _best_fill(left: dict[int, int], sizes: list[int], capacity: int) -> tuple[dict[int, int], int]:
    """Returns how many examples of each length go together into a row, and the work it was.

    ``left`` is how many there are of each; ``sizes`` are the lengths there are, the shortest first.
    """
    longest = sizes[-1]
    room = capacity - longest
    fitting = bisect_right(sizes, room)
    long = max(0, fitting - MOST_SIZES)
    everything = (1 << (room + 1)) - 1
    # Bit n of a set of sums: some of the examples so far have n tokens together.
    sums = [1]
    parts: list[tuple[int, int]] = []
    for length in reversed(sizes[: min(long, MOST_SIZES)] + sizes[long:fitting]):
        most = min(left[length] - (length == longest), room // length if length else 0)
        times = 1
        while most > 0:
            times = min(times, most)
            parts.append((length, times))
            sums.append((sums[-1] | sums[-1] << length * times) & everything)
            most, times = most - times, 2 * times
        if sums[-1] >> room:
            # A full row: more lengths would not change what is taken.
            break
    best = sums[-1].bit_length() - 1
    pattern = {longest: 1}
    for i in range(len(parts) - 1, -1, -1):
        length, times = parts[i]
        # Long ones first: what short ones can do, they can do later too.
        if not sums[i] >> best & 1:
            best -= length * times
            pattern[length] = pattern.get(length, 0) + times
    return pattern, len(parts) * (1 + room // 2048)

"""Merging into a model folder, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_peft.engine.fingerprint import Fingerprint, checksum
from lightning_peft.engine.streamed_merging import Into, StreamedMerge, WeightErrors
from lightning_peft.engine.vocabulary import vocabulary_size
from lightning_peft.errors import BaseMismatchError, CheckpointError, ConfigError, itemize
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import INDEX, Base, find_base, make_outline
from lightning_peft.export.file_layout import FileLayout, StoredTensor, TensorGroup
from lightning_peft.export.loading_code import labels_of
from lightning_peft.export.output import (
    atomic_folder,
    check_output_free,
    copy_companions,
    in_file_order,
    write_json,
    write_safetensors,
)

REPORT = "merge_report.json"
# Written here, or about the folder that it is in.
NOT_COPIED = (INDEX, "config.json", "README.md", "gguf.json", "summary.json")
WAYS = ("dequantized", "original", "requantized")

# What is going on, how many bytes of it are done, and of how many.
Progress = Callable[[str, int, int], None]


@dataclass
class MergedFolder:
    """A merged model on disk, with the errors of each adapted layer.

    ``base_checked`` indicates whether the base was compared with the one recorded in training.
    """

    folder: Path
    into: Into
    dtype: str
    bytes: int
    base_checked: bool
    weights: list[WeightErrors] = field(default_factory=list)

    def summary(self, way: str) -> dict[str, float] | None:
        """Returns median and largest error of the layers, for one way of merging."""
        values = [value for x in self.weights if (value := getattr(x, way)) is not None]
        return {"median": median(values), "worst": max(values)} if values else None


def merge_into_folder(
    adapter: Adapter,
    output: Path,
    base: Base,
    *,
    dtype: torch.dtype | None = None,
    into: Into | None = None,
    check_base: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> MergedFolder:
    """Writes the model with the adapter built in, one tensor in memory at a time.

    ``output`` must not exist, or be empty; the other arguments are those of
    :func:`lightning_peft.export.merging.merge`.
    """
    check_output_free(output)
    merge, layout = prepare(adapter, base, into, dtype)
    checked = check_base and base_checked(adapter, base, merge, layout, progress)
    plan = planned(base, merge, layout)
    tensors = [stored for shard in plan.values() for stored in shard.values()]
    size = sum(stored.numel * stored.dtype.itemsize for stored in tensors)
    refuse_full_disk(output, size)
    with atomic_folder(output) as folder:
        _write_weights(folder, base, merge, layout, plan, progress, size)
        merge.check_complete()
        written = main_dtype(tensors)
        _write_companions(folder, base, adapter, written, vocabulary_size(merge.outline))
    return MergedFolder(output, merge.into, written, size, checked, merge.errors)


def base_of(adapter: Adapter, base: str | None = None, revision: str | None = None) -> Base:
    """Returns the base of an adapter: the one that is named, else the recorded one."""
    name = base or adapter.base_name
    if name is None:
        raise ConfigError(
            f"The adapter in {str(adapter.folder)!r} does not record what it was trained on. Name "
            "the base by --base, as a folder or by its name on the hub."
        )
    try:
        return find_base(name, revision or (None if base else adapter.base_revision))
    except ConfigError as error:
        if base:
            raise
        raise ConfigError(
            f"{error} The adapter in {str(adapter.folder)!r} records it as its base; name where "
            "that is now by --base."
        ) from error


def prepare(
    adapter: Adapter, base: Base, into: Into | None, dtype: torch.dtype | None
) -> tuple[StreamedMerge, FileLayout]:
    """Returns the merge that is to be streamed, and how the files hold the model."""
    outline = make_outline(base, adapter.base.get("class"), labels_of(adapter.folder))
    layout = base.layout(outline)
    merge = StreamedMerge(outline, adapter.folder, into=into, dtype=dtype)
    aliases = _aliases(outline)
    here = {alias for name in layout.by_name for alias in aliases.get(name, [name])}
    here |= set(merge.replaced())
    own = {id(param) for param in merge.adapter_parameters()}
    lacking = [
        name
        for name, param in outline.named_parameters()
        if name not in here and id(param) not in own
    ]
    if lacking:
        raise CheckpointError(
            f"The files of {base.name!r} lack weights of {type(outline).__name__}, and the adapter "
            "does not bring them:" + itemize(lacking, 5)
        )
    return merge, layout


def refuse_full_disk(output: Path, size: int) -> None:
    """Refuses to write ``size`` bytes where there is no room for them."""
    place = next(p for p in output.resolve().parents if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < size * 1.02:
        raise ConfigError(
            f"The merged model takes {size / 1e9:.2f} GB, and {str(place)!r} has "
            f"{free / 1e9:.2f} GB free. Make room, or name another output."
        )


def base_checked(
    adapter: Adapter, base: Base, merge: StreamedMerge, layout: FileLayout, progress: Progress
) -> bool:
    """Compares the base with the recorded one; indicates whether there was a record."""
    recorded = adapter.base.get("fingerprint")
    if recorded is None:
        return False
    outline: Any = merge.outline
    total, done, found = sum(s.numel for s in base.keys.values()), 0, {}
    aliases = _aliases(outline)
    for name, (shape, _) in merge.base.tensors.items():
        there = next((a for a in aliases.get(name, [name]) if a in layout.by_name), name)
        if layout.shape(there) != shape:
            raise CheckpointError(
                f"{name} has the shape {shape} in {type(outline).__name__}, and in the files of "
                f"{base.name!r} {layout.shape(there) or 'it is not there'}."
            )
        group = layout.by_name[there]
        found[name] = shape, checksum(group.joined(base.tensors(group.keys))[there])
        done += torch.Size(shape).numel()
        progress("checking the base", done, total)
    digest = Fingerprint(found).digest()
    if digest != recorded:
        raise BaseMismatchError(
            f"The adapter in {str(adapter.folder)!r} was trained on other weights "
            f"({adapter.base_name or 'unnamed'}, fingerprint {recorded[:12]}) than those in "
            f"{base.name!r} (fingerprint {digest[:12]}). The merged model would compute something "
            "else. Name the base of the run by --base and --revision, or pass --no-check-base if "
            "they are meant to differ."
        )
    return True


def _aliases(outline: Any) -> dict[str, list[str]]:
    """Returns all names of each tensor, by every one of them."""
    groups: dict[int, list[str]] = {}
    for name, value in outline.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return {name: group for group in groups.values() for name in group}


def planned(
    base: Base, merge: StreamedMerge, layout: FileLayout
) -> dict[str, dict[str, StoredTensor]]:
    """Returns the tensors of each file of the merged model, by key.

    Those of which one of the model is made are next to each other, in the file of the first.
    """
    replaced, there, left = merge.replaced(), set(layout.by_name), set(base.keys)
    plan: dict[str, dict[str, StoredTensor]] = {}
    for file, shard in base.shards.items():
        for group in layout.groups_of(sorted(left & shard.keys())):
            left -= set(group.keys)
            name, stored = group.names[0], [base.keys[key] for key in group.keys]
            shapes = [one.shape for one in stored]
            if not group.is_converted:
                own = replaced.get(name)
                shapes = [merge.shape_of(name, *shapes) if own is None else tuple(own.shape)]
            dtype = merge.dtype_of(name, stored[0].dtype)
            entries = [StoredTensor(dtype, shape) for shape in shapes]
            plan.setdefault(file, {}).update(zip(group.keys, entries, strict=True))
    tied = _aliases(merge.outline)
    new = {
        name: StoredTensor(merge.dtype_of(name, value.dtype), tuple(value.shape))
        for name, value in replaced.items()
        if name not in there and not there & set(tied.get(name, []))
    }
    # Such as a new head. Not in a file of its own: next to model.safetensors nothing else is read.
    plan[max(plan)] |= new
    return plan


def main_dtype(tensors: Iterable[StoredTensor]) -> str:
    """Returns the name of the dtype of most of the numbers that are not whole ones."""
    sizes: Counter[torch.dtype] = Counter()
    for stored in tensors:
        if stored.dtype.is_floating_point:
            sizes[stored.dtype] += stored.numel
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def _write_weights(
    folder: Path,
    base: Base,
    merge: StreamedMerge,
    layout: FileLayout,
    plan: dict[str, dict[str, StoredTensor]],
    progress: Progress,
    size: int,
) -> None:
    done = 0

    def values(entries: dict[str, StoredTensor]) -> Iterator[Tensor]:
        nonlocal done
        for value in merged_values(base, merge, layout, entries, in_file_order(entries)):
            done += value.numel() * value.element_size()
            progress("merging", done, size)
            yield value

    for file, entries in plan.items():
        write_safetensors(folder / file, entries, values(entries))
    if len(plan) > 1 or (base.folder / INDEX).is_file():
        weight_map = {key: file for file, entries in plan.items() for key in entries}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def merged_values(
    base: Base,
    merge: StreamedMerge,
    layout: FileLayout,
    entries: dict[str, StoredTensor],
    order: list[str],
) -> Iterator[Tensor]:
    """Yields tensors of the merged model, one at a time, in ``order``, keys among ``entries``.

    Keys of which one tensor of the model is made have to be next to each other.
    """
    for group, merged in merged_groups(base, merge, layout, entries, order):
        parts = group.split(merged)
        del merged
        yield from (parts.pop(key) for key in group.keys)


def merged_groups(
    base: Base,
    merge: StreamedMerge,
    layout: FileLayout,
    entries: dict[str, StoredTensor],
    order: list[str],
) -> Iterator[tuple[TensorGroup, dict[str, Tensor]]]:
    """The same before they are split as files have them: the tensors of the model by name."""
    replaced, groups = merge.replaced(), layout.groups_of(order)
    read = base.tensors(
        [key for group in groups if not replaced.keys() >= {*group.names} for key in group.keys]
    )
    for group in groups:
        # An adapted embedding has an adapter on top of what the file brings.
        values = {name: replaced[name] for name in group.names if name in replaced}
        if len(values) < len(group.names):
            values = group.joined(islice(read, len(group.keys))) | values
        dtype = entries[group.keys[0]].dtype
        yield (
            group,
            {name: merge.merged(name, values.pop(name)).to(dtype) for name in group.names},
        )


def _write_companions(
    folder: Path, base: Base, adapter: Adapter, dtype: str, vocabulary: int | None
) -> None:
    """Copies tokenizer, generation config and the like as they are, and rewrites the config."""
    copy_companions(base.folder, folder, NOT_COPIED)
    text = json.loads(base.config.to_json_string(use_diff=True)) | {"dtype": dtype}
    recorded = adapter.base.get("vocabulary")
    if recorded is not None and recorded == vocabulary:
        holder = text if "vocab_size" in text else text.get("text_config", text)
        holder["vocab_size"] = vocabulary
    write_json(folder / "config.json", text)
    template = adapter.chat_template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def report_of(result: MergedFolder, adapter: Adapter, base: Base) -> dict[str, Any]:
    """Returns the merge report as primitives."""
    return {
        "base": base.name,
        "adapter": str(adapter.folder),
        "adapter_sha256": adapter.facts.get("adapter_sha256"),
        "into": result.into,
        "dtype": result.dtype,
        "bytes": result.bytes,
        "base_checked": result.base_checked,
        "weight_errors": {way: result.summary(way) for way in WAYS},
        "layers": [asdict(layer) for layer in result.weights],
    }

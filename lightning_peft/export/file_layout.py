"""Layout of tensors in model files.

Most are one tensor in a file under a name of their own. Others are joined, as transformers does on
loading and undoes on saving: files of Mixtral and Qwen3-MoE hold each expert apart, and the model
holds all experts of a block in one parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.compat.transformers import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    tensors_as_saved,
    tied_weights,
    weight_conversions,
)
from lightning_peft.errors import CheckpointError, UnsupportedError, itemize


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()


@dataclass
class TensorGroup:
    """Tensors in files, and those of the model that are made of them: mostly one and the same.

    Attributes:
        keys: Names in the files, in the order in which :meth:`joined` takes them.
        names: Names in the model.
        is_converted: Whether those of the model are others.
    """

    keys: list[str]
    names: list[str]
    is_converted = False

    def joined(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the model by name, from those of the files."""
        return dict(zip(self.names, tensors, strict=True))

    def split(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the files by key, from those of the model; the inverse."""
        return {key: tensors[name] for key, name in zip(self.keys, self.names, strict=True)}


@dataclass
class _ConvertedGroup(TensorGroup):
    model: Any
    converter: Any
    saved: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    # The part of the converter's pattern that each key matches.
    patterns: list[str] = field(default_factory=list)
    is_converted = True

    def joined(self, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        converter, target = copy.deepcopy(self.converter), self.names[0]
        for key, pattern, tensor in zip(self.keys, self.patterns, tensors, strict=True):
            converter.add_tensor(target, key, pattern, tensor)
        made = converter.convert(target, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def split(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.saved(tensors)


class FileLayout:
    """The tensors of a model by those in its files.

    Keys that the model does not have are tensors of their own, under their names.

    Args:
        base_name: What messages call the files.
        keys: The tensors in the files.
        outline: The model, on the meta device.

    Attributes:
        groups: By key in the files.
        by_name: The same by name in the model.

    Raises:
        CheckpointError: If tensors that are joined are not of the model's sizes.
        UnsupportedError: If what transformers joins cannot be taken apart again.
    """

    def __init__(
        self, base_name: str, keys: Mapping[str, StoredTensor], outline: nn.Module
    ) -> None:
        self.base_name, self._keys, self._model = base_name, keys, outline
        model: Any = outline
        self._conversions = weight_conversions(model)
        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.groups: dict[str, TensorGroup] = {}
        self.by_name: dict[str, TensorGroup] = {}
        prefix = model.base_model_prefix, self._shapes
        # In the order in which transformers collects them.
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, *prefix)
            if name not in self._shapes and key in self._shapes:
                name, pattern = rename_source_key(key, [], [], *prefix)
            if pattern is None or name not in self._shapes:
                self.groups[key] = self.by_name[name] = TensorGroup([key], [name])
                continue
            group = self.by_name.get(name)
            if not isinstance(group, _ConvertedGroup):
                plain, _ = rename_source_key(key, renamings, converters)
                saved = self._saved_by(name, plain)
                group = _ConvertedGroup([], [name], model, by_pattern[pattern], saved)
                self.by_name[name] = group
            group.keys.append(key)
            group.patterns.append(pattern)
            self.groups[key] = group
        for name, group in list(self.by_name.items()):
            if isinstance(group, _ConvertedGroup):
                self._check(name, group)

    def _saved_by(self, name: str, plain: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns the operations that split the tensors under the names that files have.

        Files of ``MixtralModel`` lack the prefix that ``MixtralForCausalLM`` has, or the other way.
        """
        lacking = name.removesuffix(plain) if name.endswith(plain) else ""
        more = plain.removesuffix(name) if plain.endswith(name) else ""

        def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            state = {f"{more}{n.removeprefix(lacking)}": value for n, value in tensors.items()}
            return tensors_as_saved(self._model, self._conversions, state)

        return split

    def _check(self, name: str, group: _ConvertedGroup) -> None:
        """Joins and takes apart without values: nothing has been written at this point."""
        stored = {key: self._keys[key] for key in group.keys}
        empty = [torch.empty(one.shape, dtype=one.dtype, device="meta") for one in stored.values()]
        dtypes = {one.dtype for one in stored.values()}
        try:
            made = group.joined(empty)
            again = {} if len(dtypes) > 1 else group.split(dict(made))
        except (RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
            raise self._refused(group, f"transformers cannot convert them: {error}") from error
        wrong = [one for one in made if tuple(made[one].shape) != self._shapes.get(one)]
        if wrong:
            raise CheckpointError(
                f"{wrong[0]} of {type(self._model).__name__} has the shape "
                f"{self._shapes.get(wrong[0])}, and its {len(stored)} tensors in the files of "
                f"{self.base_name!r} make {tuple(made[wrong[0]].shape)}: some are absent, or they "
                "are those of another model:" + itemize(stored, 3)
            )
        if len(dtypes) > 1:
            raise self._refused(group, f"they differ in dtype ({', '.join(map(str, dtypes))})")
        if {key: tuple(value.shape) for key, value in again.items()} != {
            key: one.shape for key, one in stored.items()
        }:
            raise self._refused(group, f"transformers would save them as {', '.join(again)[:200]}")
        group.names = list(made)
        self.by_name |= dict.fromkeys(made, group)

    def _refused(self, group: TensorGroup, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self._model).__name__} puts {group.names[0]} together from several tensors in "
            f"the files of {self.base_name!r}, and {why}:" + itemize(group.keys, 3) + "\nSuch a "
            "model is not merged file by file. In Python, with the whole model in memory: "
            "lightning_peft.load_adapter, lightning_peft.merge, lightning_peft.unload and "
            "model.save_pretrained."
        )

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape that a tensor of the model has by the files; ``None`` without any."""
        group = self.by_name.get(name)
        if group is None or isinstance(group, _ConvertedGroup):
            return None if group is None else self._shapes[name]
        return self._keys[group.keys[0]].shape

    def name(self, key: str) -> str:
        """Returns the name in the model of a tensor in the files; of several, the first.

        A head that is tied to an embedding which the files do not name is that embedding.
        """
        name = self.groups[key].names[0] if key in self.groups else key
        source = tied_weights(self._model).get(name, name)
        return name if source in self.by_name else source

    def groups_of(self, keys: Iterable[str]) -> list[TensorGroup]:
        """Returns the groups that ``keys`` belong to, in their order; each once.

        A key that no file has, such as that of a new head, is the name in the model.
        """
        groups = [self.groups.get(key) or TensorGroup([key], [key]) for key in keys]
        return list({id(group): group for group in groups}.values())

"""GGUF models with tokenizer and chat template, from the files of the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from lightning_peft.engine.streamed_merging import Into, StreamedMerge
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base
from lightning_peft.export.file_layout import FileLayout, StoredTensor, TensorGroup
from lightning_peft.export.gguf.architectures import Architecture, architecture_of
from lightning_peft.export.gguf.files import (
    Progress,
    WrittenTensor,
    kind_of,
    new_writer,
    write_tensors,
)
from lightning_peft.export.gguf.vocabulary import Vocabulary, vocabulary_of
from lightning_peft.export.go_template import translate
from lightning_peft.export.loading import load_tokenizer
from lightning_peft.export.merged_folder import merged_groups, planned, prepare

_EMBEDDING = "model.embed_tokens.weight"
# Merged in the dtype in which it is written; what is quantized comes from float32.
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GgufModel:
    """A model that can be written as GGUF: everything has been checked, and nothing written.

    ``layout`` is that of the base's files, ``plan`` the tensors of the merged
    model by key, file by file, as in the base.
    """

    base: Base
    merge: StreamedMerge
    layout: FileLayout
    plan: dict[str, dict[str, StoredTensor]]
    architecture: Architecture
    vocabulary: Vocabulary
    chat_template: str | None

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        return [*self.architecture.notes, *self.vocabulary.notes]

    def write_merged(self, file: Path, kind: str, facts: dict[str, str], progress: Progress) -> int:
        """Writes the model with the adapter built in, and ``facts`` by GGUF's keys."""
        values = (
            merged.items()
            for shard in self.plan.values()
            for _, merged in merged_groups(
                self.base, self.merge, self.layout, shard, self._order(shard)
            )
        )
        size = self._write(file, self.plan, chain.from_iterable(values), kind, facts, progress)
        self.merge.check_complete()
        return size

    def write_base(self, file: Path, kind: str, facts: dict[str, str], progress: Progress) -> int:
        """Writes the base without the adapter, as :meth:`write_merged`."""
        # In one, as several tensors of experts may be in several files.
        groups = self.layout.groups_of(self._order(self.base.keys))
        # Not in the order of the files, in which expert 10 comes before expert 2.
        read = self.base.tensors([key for group in groups for key in group.keys])
        values = (group.joined(islice(read, len(group.keys))).items() for group in groups)
        plan = {"": self.base.keys}
        return self._write(file, plan, chain.from_iterable(values), kind, facts, progress)

    @property
    def numel(self) -> int:
        """How many numbers the merged model has."""
        return sum(stored.numel for shard in self.plan.values() for stored in shard.values())

    def check_names(self) -> None:
        """Refuses a model with tensors that llama.cpp has no place for."""
        for shard in self.plan.values():
            self._order(shard)

    def _order(self, shard: dict[str, StoredTensor]) -> list[str]:
        """Returns the keys of a file whose tensors are written, in the order of the model."""
        place = {name: index for index, name in enumerate(self.merge.outline.state_dict())}
        names = {key: self.layout.name(key) for key in shard}
        written = self.architecture.tensor_names([n for n in names.values() if n in place])
        return sorted(
            (key for key, name in names.items() if name in written),
            key=lambda key: place[names[key]],
        )

    def _write(
        self,
        file: Path,
        plan: dict[str, dict[str, StoredTensor]],
        values: Iterator[tuple[str, Tensor]],
        kind: str,
        facts: dict[str, str],
        progress: Progress,
    ) -> int:
        writer = new_writer(file, self.architecture.family.name, kind)
        writer.add_type("model")
        for key, value in facts.items():
            writer.add_string(key, value)
        self.architecture.add_to(writer, len(self.vocabulary.tokens))
        self.vocabulary.add_to(writer)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)
        tensors = [
            WrittenTensor.of(name, value, "f32") for name, value in self.architecture.computed()
        ]
        pieces = (one for name, value in values for one in self.architecture.split(name, value))
        for shard in plan.values():
            for group in self.layout.groups_of(self._order(shard)):
                for name, shape in self._shapes(group, shard):
                    tensors += [
                        WrittenTensor(there, own, partial(next, pieces), kind_of(there, own, kind))
                        for there, own in self.architecture.pieces(name, shape)
                    ]
        return write_tensors(writer, tensors, progress)

    def _shapes(
        self, group: TensorGroup, shard: dict[str, StoredTensor]
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the tensors of the model that a group makes, with their shapes."""
        if not group.is_converted:
            yield self.layout.name(group.keys[0]), shard[group.keys[0]].shape
            return
        for name in group.names:
            shape = self.layout.shape(name)
            assert shape is not None
            yield name, shape


def prepare_model(
    adapter: Adapter, base: Base, kind: str, into: Into | None, chat_template: str | None
) -> GgufModel:
    """Returns a model that can be written in a file of the kind ``kind``, one of ``KINDS``."""
    name = adapter.base.get("class") or (base.config.architectures or ["A model of no class"])[0]
    architecture_of(str(name), base.config)
    merge, layout = prepare(adapter, base, into, _DTYPES.get(kind, torch.float32))
    plan = planned(base, merge, layout)
    architecture = architecture_of(type(merge.outline).__name__, base.config)
    shapes = {
        layout.name(key): stored.shape for shard in plan.values() for key, stored in shard.items()
    }
    tokenizer = load_tokenizer(base)
    template = chat_template or _own_template(tokenizer)
    turns = translate(tokenizer, template) if template else None
    end = None if turns is None else turns.end
    prompt = _rendered(tokenizer, template) if template else None
    vocabulary = vocabulary_of(tokenizer, shapes[_EMBEDDING][0], end, prompt)
    model = GgufModel(base, merge, layout, plan, architecture, vocabulary, template)
    model.check_names()
    return model


def _own_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template


def _rendered(tokenizer: Any, template: str) -> str | None:
    turn = {"role": "user", "content": "text"}
    try:
        return str(tokenizer.apply_chat_template([turn], chat_template=template, tokenize=False))
    except (TemplateError, ValueError):
        return None

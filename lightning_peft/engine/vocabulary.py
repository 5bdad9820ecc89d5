"""Resized embeddings.

``resize_token_embeddings`` makes rows that no file of the base holds. Where the base's own
configuration has another vocabulary, checkpoints and adapter folders hold the embeddings, and the
same size is restored when they are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_peft.compat.transformers import origin_of
from lightning_peft.engine.fingerprint import Fingerprint, fingerprint

log = logging.getLogger(__name__)


def vocabulary_size(part: nn.Module) -> int | None:
    """Returns the number of rows of the input embeddings, or ``None`` where there are none."""
    if not isinstance(part, PreTrainedModel):
        return None
    try:
        weight = getattr(part.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def pretrained_vocabulary_size(part: nn.Module) -> int | None:
    """Returns the vocabulary in the configuration that the base was loaded with.

    Only files on this machine are read. ``None`` where there is no such file, or where it has no
    vocabulary.
    """
    name, revision = origin_of(getattr(part, "config", None))
    if not isinstance(part, PreTrainedModel) or name is None:
        return None
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    for holder in (fields, fields.get("text_config") or {}):
        size = holder.get("vocab_size") if isinstance(holder, Mapping) else None
        if isinstance(size, int):
            return size
    return None


def resized_embeddings(part: nn.Module, trained: Mapping[str, set[int]]) -> list[str]:
    """Returns the weights of embeddings that no file of the base has, and adapters neither.

    Where the rows in ``trained``, by layer, are all new ones, nothing else of the weight is new.
    """
    sizes = _changed_size(part)
    if sizes is None:
        return []
    loaded, now = sizes
    names = [
        name
        for name in _embedding_tensors(part)
        if not name.endswith(".weight")
        or now < loaded
        or not set(range(loaded, now)) <= trained.get(name.removesuffix(".weight"), set())
    ]
    if not names:
        return []
    log.info(
        "The vocabulary of %s was changed from %s to %s after it was loaded: its embeddings are "
        "saved with the adapter.",
        type(part).__name__,
        f"{loaded:,}",
        f"{now:,}",
    )
    return names


def trains_new_rows(config: Mapping[str, Any], recorded: Mapping[str, Any], part: Any) -> bool:
    """Whether an adapter brings all rows that the vocabulary of a record has more than ``part``."""
    tokens, then = config.get("trainable_token_indices"), recorded.get("vocabulary")
    now = vocabulary_size(part)
    if not tokens or then is None or now is None:
        return False
    lists = tokens.values() if isinstance(tokens, Mapping) else [tokens]
    return all(set(range(now, then)) <= set(rows) for rows in lists)


def without_new_rows(part: Any, loaded: Fingerprint) -> Fingerprint:
    """Returns the fingerprint of a part with the rows of its embeddings that its files have.

    The others are random: what they became is in checkpoints and folders.
    """
    sizes = _changed_size(part)
    if sizes is None:
        return loaded
    held = dict(part.named_parameters())
    names = [name for name in _embedding_tensors(part) if name in loaded.tensors]
    short = fingerprint((name, held[name][: sizes[0]]) for name in names)
    return Fingerprint({**loaded.tensors, **short.tensors})


def _changed_size(part: nn.Module) -> tuple[int, int] | None:
    """Returns the vocabulary that was loaded and that of now, where they are not one."""
    now = vocabulary_size(part)
    if now is None or not isinstance(part, PreTrainedModel):
        return None
    loaded = pretrained_vocabulary_size(part)
    text = part.config.get_text_config()
    if loaded is None or getattr(text, "vocab_size", loaded) == loaded:
        return None
    return loaded, now


def _embedding_tensors(part: Any) -> list[str]:
    layers = {id(part.get_input_embeddings()), id(part.get_output_embeddings())}
    return [
        f"{name}.{leaf}"
        for name, child in part.named_modules()
        if id(child) in layers
        for leaf in child._parameters
        if child._parameters[leaf] is not None
    ]


def vocabulary_mismatch(recorded: Mapping[str, Any], part: nn.Module) -> str | None:
    """Returns how the vocabulary of a record differs from that of ``part``, with what to do."""
    then, now = recorded.get("vocabulary"), vocabulary_size(part)
    if then is None or now is None or then == now:
        return None
    return (
        f"vocabulary {now:,} in the base, {then:,} in the run: call "
        f"model.resize_token_embeddings({then}) after loading the base"
    )


@contextmanager
def resized_as_recorded(
    module: nn.Module, recorded: Iterable[tuple[str, Mapping[str, Any], bool]]
) -> Iterator[None]:
    """Gives parts the vocabulary that is recorded; configurations are put back on an error."""
    changed = []
    for name, record, brought in recorded:
        part: Any = module.get_submodule(name)
        then, now = record.get("vocabulary"), vocabulary_size(part)
        if not brought or then is None or now is None or then == now:
            continue
        text = part.config.get_text_config()
        changed.append((text, text.vocab_size))
        part.resize_token_embeddings(then, mean_resizing=False)
        log.warning(
            "Vocabulary %s in the base, %s in the run: the embeddings are resized, and their "
            "values come from the file. The tokenizer of the run has the new tokens.",
            f"{now:,}",
            f"{then:,}",
        )
    try:
        yield
    except BaseException:
        for config, size in changed:
            config.vocab_size = size
        raise

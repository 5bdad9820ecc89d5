"""Cached description folder of a GGUF model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_peft.engine.cache_entries import cache_root
from lightning_peft.errors import UnsupportedError

TABLE = "gguf.json"
_KEYS = frozenset({"file", "sha256", "architecture", "dtype", "tensors"})


def gguf_cache() -> Path:
    """Returns the folder of the cache with the descriptions of GGUF files."""
    return cache_root() / "gguf"


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file."""

    folder: Path
    facts: dict[str, Any]

    @property
    def file(self) -> Path:
        """The file, by its real path."""
        return Path(self.facts["file"])

    @property
    def sha256(self) -> str:
        """Hash of all its bytes."""
        return str(self.facts["sha256"])

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.facts["architecture"])

    @property
    def dtype(self) -> torch.dtype:
        """What its weights become where no dtype is asked for; float32 for quantized ones."""
        dtype: torch.dtype = getattr(torch, self.facts["dtype"])
        return dtype

    def check_tokenizer(self) -> None:
        """Checks that the file's own tokenizer was read."""
        reason = self.facts.get("no_tokenizer")
        if reason is not None:
            raise UnsupportedError(
                f"The tokenizer of {self.file.name!r} is not read: {reason}, and tokens would be "
                "others than those of the model. Name the model's tokenizer in transformers' own "
                "format: --data.tokenizer folder, or org/name."
            )

    @cached_property
    def tensors(self) -> list[dict[str, Any]]:
        """Its tensors, each with its name, kind, shape, and where its bytes are."""
        return list(self.facts["tensors"])


def read_gguf_folder(name: Any) -> GgufModel | None:
    """Returns the file that a folder of the cache was made from; ``None`` for other names."""
    folder = Path(str(name))
    try:
        # Any other folder may have a file of that name, and would name the file of its choice.
        if folder.resolve().parent != gguf_cache().resolve():
            return None
        facts = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return GgufModel(folder, facts) if isinstance(facts, dict) and facts.keys() >= _KEYS else None

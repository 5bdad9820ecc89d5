"""Hashes of what decides how data is prepared: files, rows and tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.data.open_files import explain_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def digest_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Returns a hash of the names and bytes of files."""
    total = hashlib.sha256()
    for name, path in files:
        one = hashlib.sha256()
        with explain_errors(name), path.open("rb") as file:
            while block := file.read(1 << 20):
                one.update(block)
        total.update(json.dumps([name, one.hexdigest()]).encode())
    return total.hexdigest()


def digest_of_rows(rows: Iterable[Any]) -> str:
    """Returns a hash of rows, for data of which there is no file."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, default=repr, sort_keys=True).encode("utf-8"))
    return total.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of all that decides how ``tokenizer`` tokenizes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer("a b")["input_ids"],
        version("transformers"),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

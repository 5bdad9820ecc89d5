"""GGUF files as transformers models: config and metadata, without weights.

The first use of a file writes a folder with its config, tokenizer and table of tensors, as
transformers reads them, into the cache; the weights stay where they are. From there on every part
of the package reads config and tokenizer as of any folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer
from transformers import logging as transformers_logging

from lightning_peft.compat.gguf import (
    GGUF_SUPPORTED_ARCHITECTURES,
    each_file_parsed_once,
    file_of_hub,
)
from lightning_peft.compat.transformers import causal_lm_class
from lightning_peft.engine import cache_entries
from lightning_peft.engine.loading.gguf_metadata import apply_metadata
from lightning_peft.engine.loading.gguf_model import TABLE, GgufModel, gguf_cache, read_gguf_folder
from lightning_peft.engine.loading.gguf_splits import SPLITS, save_within, set_split
from lightning_peft.engine.loading.weight_files import hashes
from lightning_peft.errors import CheckpointError, ConfigError, UnsupportedError, first_line
from lightning_peft.model_reference import ModelReference, parse_model_reference

log = logging.getLogger(__name__)

# Raised whenever a folder is written in another way.
FORMAT = 5
KIND = "model in a GGUF file"
# Longer is what tokenizers say that know no limit.
_NO_LIMIT = 1 << 30
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def find_gguf(name: Any, revision: str | None = None) -> GgufModel | None:
    """Returns the GGUF file that the name of a model means; ``None`` for other models."""
    known = read_gguf_folder(name)
    if known is not None:
        return known
    reference = parse_model_reference(name)
    if reference.gguf_file is None:
        return None
    if find_spec("gguf") is None:
        raise ConfigError(
            f"{reference.name!r} is a GGUF file, which takes the package gguf to read: "
            "pip install 'lightning-peft[gguf]'"
        )
    file, commit = _file(reference, revision)
    (digest,) = hashes([file.resolve()], cache_entries.cache_root() / "hashes")
    versions = {package: version(package) for package in ("gguf", "transformers")}
    # The path counts too: it is what weights are read from.
    key = cache_entries.key_of(format=FORMAT, file=str(file), sha256=digest, versions=versions)

    def build(working: Path) -> dict[str, Any]:
        with each_file_parsed_once(), _alone(file) as link:
            facts = _describe(reference, link)
            facts |= {"file": str(file), "sha256": digest, "commit": commit}
            _write(working, link, facts)
        return {"model": reference.name, "sha256": digest, "versions": versions}

    folder = cache_entries.entry(gguf_cache(), key, build, KIND, "XDG_CACHE_HOME")
    return read_gguf_folder(folder)


def _file(reference: ModelReference, revision: str | None) -> tuple[Path, str | None]:
    local, file = reference.local_file, str(reference.gguf_file)
    if local is not None:
        return local.resolve(), None
    try:
        found, commit = file_of_hub(reference.place, file, revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{reference.name!r}: {reference.place!r} is not a folder here, and the hub did not "
            f"give its file {file!r} ({first_line(error)}). Check both names and the network "
            "(HF_HUB_OFFLINE must not be set)."
        ) from error
    # Not through the link: its name in the repository says more than that of the blob.
    return found, commit


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Gives the file in a folder of its own.

    transformers takes the tokenizer, its class and its code from files next to it where there are
    any, which may be of another model.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        link = Path(folder) / file.name
        for place in (os.symlink, os.link, shutil.copyfile):
            try:
                place(file.absolute(), link)
                break
            except (OSError, NotImplementedError):
                # Windows lets few users make links, and none lead to another disk.
                if place is shutil.copyfile:
                    raise
        yield link


def _describe(reference: ModelReference, file: Path) -> dict[str, Any]:
    try:
        reader = import_module("gguf").GGUFReader(str(file))
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{reference.name!r} is not a complete GGUF file ({type(error).__name__}: "
            f"{first_line(error)}). It was cut short, or is another format; fetch it again."
        ) from error
    if architecture in ("clip", "mmproj"):
        raise UnsupportedError(
            f"{reference.name!r} is the projector of a vision model (architecture "
            f"{architecture!r}), not a language model. Name the file with the language model."
        )
    tensors = [
        {
            "name": tensor.name,
            "kind": int(tensor.tensor_type),
            "kind_name": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "stored": [int(size) for size in tensor.data.shape],
            "dtype": str(tensor.data.dtype),
            "start": int(tensor.data_offset),
        }
        for tensor in reader.tensors
    ]
    kinds = {str(tensor["kind_name"]) for tensor in tensors}
    words, kind = (reader.fields.get(f"tokenizer.ggml.{key}") for key in ("pre", "model"))
    return {
        "architecture": architecture,
        "dtype": _dtype(kinds),
        "pre_tokenizer": words and words.contents(),
        "byte_level": kind is not None and kind.contents() == "gpt2",
        "tensors": tensors,
        "metadata": {
            key.removeprefix(f"{architecture}."): field.contents()
            for key, field in reader.fields.items()
            if key.startswith(f"{architecture}.")
        },
    }


def _dtype(kinds: set[str]) -> str:
    """Returns the dtype of a file; norms are float32 in files of 16 bits too."""
    if not kinds <= set(_FLOATS):
        return "float32"
    return next((_FLOATS[kind] for kind in ("BF16", "F16") if kind in kinds), "float32")


def _write(working: Path, file: Path, facts: dict[str, Any]) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent)}
    where |= {"gguf_file": file.name, "trust_remote_code": False}
    verbosity = transformers_logging.get_verbosity()
    # It names metadata that it does not use, license and all.
    transformers_logging.set_verbosity_error()
    try:
        config = _config(file, facts["architecture"], where)
        apply_metadata(config, facts["metadata"], facts["architecture"], file.name)
        tokenizer = _tokenizer(where, facts)
    finally:
        transformers_logging.set_verbosity(verbosity)
    config.dtype = facts["dtype"]
    model_class = causal_lm_class(config)
    if not config.architectures and model_class is not None:
        config.architectures = [model_class.__name__]
    config.__dict__.pop("_model_name_or_path", None)
    config.save_pretrained(working)
    if tokenizer is not None:
        if facts["byte_level"] and facts["pre_tokenizer"] is not None:
            set_split(tokenizer, facts["pre_tokenizer"])
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit and tokenizer.model_max_length > _NO_LIMIT:
            tokenizer.model_max_length = limit
        save_within(tokenizer, working, config.get_text_config().vocab_size)
    (working / TABLE).write_text(json.dumps(facts), encoding="utf-8")


def _config(file: Path, architecture: str, where: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(**where)
    except (StrictDataclassError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        known = ", ".join(sorted(GGUF_SUPPORTED_ARCHITECTURES))
        raise UnsupportedError(
            f"{file.name!r} has the architecture {architecture!r}, and transformers "
            f"{version('transformers')} cannot read it from GGUF ({first_line(error)}). Use the "
            f"model in transformers' own format, or one of: {known}."
        ) from error


def _tokenizer(where: dict[str, Any], facts: dict[str, Any]) -> Any:
    """Returns the tokenizer of a file; ``None`` where it cannot be made, with the reason noted."""
    words = facts["pre_tokenizer"]
    # A tokenizer of the user's choice may be named; who asks for this one is answered then.
    if facts["byte_level"] and words is not None and words not in SPLITS:
        facts["no_tokenizer"] = f"it splits text into words by {words!r}, which is not known here"
        return None
    if facts["byte_level"] and words is None:
        log.warning(
            "%s does not name how its tokenizer splits text into words (tokenizer.ggml.pre), as "
            "old files do: GPT-2's way is taken. If the model is of another family, name its "
            "tokenizer in transformers' own format.",
            where["gguf_file"],
        )
    try:
        return AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        facts["no_tokenizer"] = f"transformers cannot make it: {first_line(error)}"
        return None

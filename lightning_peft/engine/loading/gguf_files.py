"""GGUF files as transformers models: config and metadata, without weights.

The first use of a file writes a folder with its config, tokenizer and table of tensors, as
transformers reads them, into the cache; the weights stay where they are. From there on every part
of the package reads config and tokenizer as of any folder.

transformers reads some of the numbers on positions and attention for some architectures and takes
its own defaults for the others, so that a model would compute other numbers than in training.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
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
from lightning_peft.engine.loading.gguf_model import TABLE, GgufModel, gguf_cache, read_gguf_folder
from lightning_peft.engine.loading.gguf_splits import SPLITS, save_within, set_split
from lightning_peft.engine.loading.weight_files import hashes
from lightning_peft.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedError,
    first_line,
    itemize,
)
from lightning_peft.model_reference import ModelReference, parse_model_reference

log = logging.getLogger(__name__)

# Raised whenever a folder is written in another way.
FORMAT = 5
KIND = "model in a GGUF file"
# Longer is what tokenizers say that know no limit.
_NO_LIMIT = 1 << 30
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Numbers of a scaling of which transformers knows other values only for YaRN, or none: ours by
# llama.cpp's, with the value that changes nothing.
_NEUTRAL = {
    "scaling.alpha": 0.0,
    "scaling.attn_factor": 1.0,
    "scaling.yarn_ext_factor": 1.0,
    "scaling.yarn_attn_factor": 1.0,
    "scaling.yarn_log_multiplier": 0.0,
}
_BETAS = {"scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"}
# Layers of the one size of each whose scores llama.cpp divides by the root of the model's width per
# head; no file says so. Those of other sizes are divided by the root of a head's size.
_WIDE_SCORES = {"gemma2": 46, "gemma3": 62}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Its layers have heads of two sizes, all of which transformers has defaults for.
_TWO_SIZES = ("gemma4",)


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
    # A tokenizer of the user's choice may be named; who requests this one is answered then.
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


def apply_metadata(config: Any, metadata: Mapping[str, Any], architecture: str, name: str) -> None:
    """Sets what a file says and transformers has not read."""
    text = config.get_text_config()
    # A value that is not there, or that a converter wrote for "none".
    there = {key: value for key, value in metadata.items() if value not in (None, "", "none")}
    found = [*_heads(text, there, architecture), *_window(text, there)]
    found += [*_scores(text, there, architecture)]
    # After the size of heads, which the share of a head that is rotated is of.
    found += [*_rope(text, there, architecture)]
    if found:
        raise UnsupportedError(
            f"{name!r} has metadata that transformers' {type(text).__name__} has no place for, so "
            "that the model would compute other numbers:"
            + itemize([f"{architecture}.{key}={value!r}" for key, value in found])
            + "\nUse the model in transformers' own format."
        )


Problem = tuple[str, Any]


def _heads(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    size, values = there.get("attention.key_length"), there.get("attention.value_length")
    if architecture in _TWO_SIZES or size is None:
        return
    if values not in (None, size):
        yield "attention.value_length", values
    if size != head_size(text) and not _set(text, "head_dim", size):
        yield "attention.key_length", size


def head_size(text: Any) -> int | None:
    """Returns the numbers in an attention head; ``None`` where there are no such heads."""
    for name in ("head_dim", "d_kv"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    heads = getattr(text, "num_attention_heads", None)
    return int(text.hidden_size) // heads if heads else None


def _scores(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    """Sets what the scores of attention are divided by, and where they and logits are capped."""
    layers = _WIDE_SCORES.get(architecture)
    if layers is not None:
        wide = text.num_hidden_layers == layers
        width = text.hidden_size // text.num_attention_heads
        text.query_pre_attn_scalar = width if wide else head_size(text)
    for key in _CAPS:
        if there.get(key) and not _set(text, key, there[key]):
            yield key, there[key]


def _window(text: Any, there: Mapping[str, Any]) -> Iterator[Problem]:
    window = there.get("attention.sliding_window")
    longest = there.get("context_length") or getattr(text, "max_position_embeddings", None)
    if not window or (isinstance(window, int) and longest and window >= longest):
        return
    used = getattr(text, "use_sliding_window", True)
    if not (used and isinstance(window, int) and _set(text, "sliding_window", window)):
        yield "attention.sliding_window", window


def _rope(text: Any, there: Mapping[str, Any], architecture: str) -> Iterator[Problem]:
    values = {key[5:]: value for key, value in there.items() if key.startswith("rope.")}
    rope = getattr(text, "rope_parameters", None)
    # Layers of two kinds have two ropes, and a file's numbers are of those that attend to all.
    whole = rope.get("full_attention", rope) if isinstance(rope, dict) else None
    base, scaled = values.get("freq_base"), _scaling(values)
    if not isinstance(rope, dict) or not isinstance(whole, dict):
        if base or scaled:
            yield "rope.freq_base", base
        return
    if base:
        _set_base(whole, base)
    for key in ("freq_base_swa", "local.freq_base"):
        if values.get(key) and whole is not rope:
            _set_base(rope["sliding_attention"], values[key])
        elif values.get(key):
            yield f"rope.{key}", values[key]
    yield from _rotated(text, whole, values, architecture)
    yield from _scale(whole, values, scaled, there.get("context_length"))


def _set_base(rope: dict[str, Any], base: Any) -> None:
    if not math.isclose(rope.get("rope_theta") or 0, base, rel_tol=1e-6):
        rope["rope_theta"] = float(base)


def _rotated(
    text: Any, rope: dict[str, Any], values: Mapping[str, Any], architecture: str
) -> Iterator[Problem]:
    width, size = values.get("dimension_count"), head_size(text)
    if not width or not size or architecture in _TWO_SIZES:
        return
    share = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None)
    now = int(size * share) if share else getattr(text, "rotary_dim", None) or size
    if now == width:
        return
    if "partial_rotary_factor" not in rope or not isinstance(width, int):
        yield "rope.dimension_count", width
    else:
        rope["partial_rotary_factor"] = width / size


def _scaling(values: Mapping[str, Any]) -> Any:
    kind, factor = values.get("scaling.type"), values.get("scaling.factor")
    # The name in old files, which had one kind.
    if kind is None and values.get("scale_linear") not in (None, 0, 1):
        return "linear"
    return None if kind == "linear" and factor in (None, 0, 1) else kind


def _scale(
    rope: dict[str, Any], values: Mapping[str, Any], kind: Any, longest: int | None
) -> Iterator[Problem]:
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in (None, neutral):
            yield f"rope.{key}", values[key]
    factor = values.get("scaling.factor") or values.get("scale_linear")
    if kind == "linear" and factor:
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn" and factor:
        length = values.get("scaling.original_context_length") or longest
        rope |= {"rope_type": "yarn", "factor": float(factor)}
        rope["original_max_position_embeddings"] = length
        rope |= {ours: float(values[key]) for key, ours in _BETAS.items() if values.get(key)}
    elif kind is not None:
        yield "rope.scaling.type", kind


def _set(text: Any, name: str, value: Any) -> bool:
    """Sets a value of a config; whether it has one of that name."""
    if not hasattr(text, name):
        return False
    try:
        setattr(text, name, value)
    except (AttributeError, TypeError, ValueError):
        return False
    return bool(getattr(text, name) == value)

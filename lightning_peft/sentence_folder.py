"""Metadata of sentence-transformers folders: pooling, prompts and maximum length.

Such a model is one of transformers with a few JSON files next to it. ``modules.json`` lists what
comes after the transformer; only pooling and normalizing are computed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers import AutoTokenizer

from lightning_peft.errors import ConfigError
from lightning_peft.model_reference import written_reference

Pooling = Literal["mean", "cls", "lasttoken"]
Similarity = Literal["cosine", "dot"]

MODULES = "modules.json"
ENCODER = "sentence_bert_config.json"
SENTENCES = "config_sentence_transformers.json"
# How files of older releases name the poolings.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Prompts of texts that are looked for, as sentence-transformers' `encode_document` looks them up.
_OF_PASSAGES = ("document", "passage", "corpus")


@dataclass(frozen=True)
class SentenceFolder:
    """What the files say; all defaults where the model is not one of sentence-transformers."""

    # Whether there is a `modules.json`.
    known: bool = False
    pooling: Pooling | None = None
    # To length 1.
    normalize: bool = False
    similarity: Similarity | None = None
    # In tokens.
    max_length: int | None = None
    # Texts put before others, by name.
    prompts: Mapping[str, str] = field(default_factory=dict)
    # For texts that are neither queries nor passages.
    default_prompt: str | None = None

    def prompt_of(self, role: Literal["query", "passage", "text"]) -> str:
        """Returns the prompt of a query, a passage, or a text that is neither."""
        names = {"query": ("query",), "passage": _OF_PASSAGES, "text": ()}[role]
        names = (*names, self.default_prompt or "")
        return next((self.prompts[name] for name in names if name in self.prompts), "")


def read_sentence_folder(name: str, revision: str | None = None) -> SentenceFolder:
    """Returns the settings in the files of a model, in a folder or on the hub."""
    gguf = written_reference(name).gguf_file is not None
    listed = None if gguf else _read(name, MODULES, revision)
    if listed is None:
        return SentenceFolder()
    sentences = _read(name, SENTENCES, revision) or {}
    encoder = _read(name, ENCODER, revision) or {}
    problems = []
    pooling: Any = None
    for module in listed:
        path, _, kind = str(module.get("type", "")).rpartition(".")
        if kind == "Pooling":
            pooling = _pooling(_read(name, f"{module['path']}/config.json", revision) or {})
            problems += pooling[1]
        elif path.partition(".")[0] != "sentence_transformers":
            problems.append(f"{MODULES} lists {path}.{kind}, which is code of the model's own")
        elif kind not in ("Transformer", "Normalize"):
            problems.append(f"{MODULES} lists a {kind}, which is neither trained nor kept")
    similarity = sentences.get("similarity_fn_name")
    if similarity not in (None, *get_args(Similarity)):
        problems.append(f"{SENTENCES} compares embeddings by {similarity}, not by cosine or dot")
    if encoder.get("do_lower_case") and not _makes_lower_case(name, revision):
        problems.append(f"{ENCODER} makes texts lower case, which the tokenizer here does not")
    if problems:
        raise ConfigError(
            f"{name!r} is a sentence-transformers model that cannot be trained here: "
            f"{'; '.join(problems)}. Take a model of a transformer, a pooling and Normalize."
        )
    return SentenceFolder(
        known=True,
        pooling=pooling[0] if pooling else None,
        normalize=any(str(one.get("type", "")).endswith("Normalize") for one in listed),
        similarity=similarity,
        max_length=encoder.get("max_seq_length"),
        # An empty one is none, in place of the default.
        prompts={k: text or "" for k, text in (sentences.get("prompts") or {}).items()},
        default_prompt=sentences.get("default_prompt_name"),
    )


def _makes_lower_case(name: str, revision: str | None) -> bool:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return False
    return bool(tokenizer("Ab")["input_ids"] == tokenizer("ab")["input_ids"])


def _pooling(config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    given = config.get("pooling_mode") or [name for key, name in _FLAGS.items() if config.get(key)]
    modes = [given] if isinstance(given, str) else list(given) or ["mean"]
    problems = []
    if len(modes) > 1 or modes[0] not in get_args(Pooling):
        known = ", ".join(get_args(Pooling))
        problems.append(f"it pools by {' and '.join(modes)}, and one of {known} is computed here")
    if config.get("include_prompt") is False:
        problems.append("it leaves prompts out of the pooling (include_prompt)")
    return modes[0], problems


def _read(name: str, file: str, revision: str | None) -> Any:
    """Returns the content of a JSON file of a model, or ``None`` where it has no such file."""
    path = _find(name, file, revision)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as JSON: {error}.") from error


def _find(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as error:
        raise ConfigError(_not_reached(name, file, error)) from error
    except EntryNotFoundError:
        return None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(_not_reached(name, file, error)) from error


def _not_reached(name: str, file: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"Whether {name!r} has a {file}, which says how its embeddings are made, could not be "
        f"found out: {reason} Check the name and the network (HF_HUB_OFFLINE must not be set), or "
        "name a folder."
    )

"""Loading of models by name or from GGUF files."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel

from lightning_peft.compat.transformers import COMMIT_KEY, intercepted_from_pretrained
from lightning_peft.engine.loading.gguf_files import find_gguf
from lightning_peft.engine.loading.gguf_model import GgufModel
from lightning_peft.engine.loading.quantize_on_load import GGUF_HASH, from_pretrained

# What says where a model is, which is known of a GGUF file by then.
_WHERE = ("revision", "code_revision", "trust_remote_code", "cache_dir", "token")


def readable_name(name: Any, revision: str | None = None) -> str:
    """Returns the name or folder by which transformers loads config and tokenizer of a model."""
    found = find_gguf(name, revision)
    return str(name) if found is None else str(found.folder)


def load_config(name: Any, **options: Any) -> Any:
    """Returns the config of a model, by ``AutoConfig.from_pretrained``."""
    found = find_gguf(name, options.get("revision"))
    if found is None:
        return AutoConfig.from_pretrained(name, **options)
    config = AutoConfig.from_pretrained(found.folder, **_without_place(options))
    _name_origin(config, name, found)
    return config


def load_pretrained_model(loader: Any, name: Any, **options: Any) -> PreTrainedModel:
    """Returns a model by the ``from_pretrained`` of a class of transformers.

    The tensors of a GGUF file are dequantized one by one, and quantized at once where
    :func:`~lightning_peft.engine.quantize_on_load` says so.

    Args:
        loader: The class, such as ``AutoModelForCausalLM``.
        name: See :mod:`lightning_peft.model_reference`.
        options: Further arguments.

    Raises:
        ConfigError, CheckpointError, UnsupportedError: If it is a GGUF file that cannot be read.
    """
    found = find_gguf(name, options.get("revision"))
    if found is None:
        model: PreTrainedModel = loader.from_pretrained(name, **options)
        return model
    with intercepted_from_pretrained(from_pretrained):
        model = loader.from_pretrained(found.folder, **_without_place(options))
    # A config that was loaded before has the name that the user gave.
    _name_origin(model.config, getattr(options.get("config"), "name_or_path", name), found)
    model.__dict__[GGUF_HASH] = found.sha256
    return model


def _without_place(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _WHERE}


def _name_origin(config: Any, name: Any, found: GgufModel) -> None:
    config.name_or_path = str(name)
    setattr(config, COMMIT_KEY, found.facts["commit"])

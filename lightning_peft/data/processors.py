"""Processors of text and images, loaded by name or built from settings."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoProcessor, ProcessorMixin

from lightning_peft.data.images import load_image_processor
from lightning_peft.data.tokenized import digest_of_tokenizer, load_pretrained, load_tokenizer
from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.torchvision_errors import install_command, loading_problem

_OWN_SETTINGS = ("processor_class", "image_processor", "special_tokens")


def config_problems(config: Any) -> list[str]:
    """Returns the problems of a processor's settings, before anything is loaded."""
    if config is None:
        return []
    absent = [name for name in _OWN_SETTINGS[:2] if not config.get(name)]
    return [f"processor_config={config!r} has no {' and no '.join(absent)}"] if absent else []


def load_processor(
    name: str, config: Mapping[str, Any] | None = None, revision: str | None = None
) -> Any:
    """Returns a processor for text and images.

    ``config`` are settings where ``name`` has a tokenizer alone: ``processor_class``,
    ``image_processor`` (with its type), ``special_tokens``, and arguments of the class.
    """
    try:
        if config is not None:
            return _built(name, dict(config), revision)
        found = load_pretrained(AutoProcessor, "processor", name, revision)
    except ImportError as error:
        problem = loading_problem(error)
        if problem is not None:
            raise ConfigError(problem) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(
            f"processor={name!r} needs a package that is missing: {' '.join(lines)[:300]} "
            f"Processors that also take videos need them for images alone: {install_command()} "
            "from the index of torch (Qwen-VL), pip install num2words (SmolVLM)."
        ) from error
    if not isinstance(found, ProcessorMixin) or not hasattr(found, "image_processor"):
        raise ConfigError(
            f"processor={name!r} is of {type(found).__name__}, which does not take text and "
            "images. Name an image-text model, or a folder with its processor, or give "
            "processor_config=."
        )
    return found


def _built(tokenizer_name: str, settings: dict[str, Any], revision: str | None) -> Any:
    name, image_settings, special = (settings.pop(key, None) for key in _OWN_SETTINGS)
    cls: Any = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, ProcessorMixin)):
        raise ConfigError(f"processor_class={name!r} is not a processor of transformers.")
    known = {*inspect.signature(cls.__init__).parameters} - {"self", "kwargs", "tokenizer"}
    unknown = [f"{key!r}{similar_names(key, known)}" for key in settings if key not in known]
    if unknown:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}. Correct the name.")
    tokenizer: Any = load_tokenizer(tokenizer_name, revision)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    try:
        return cls(load_image_processor(image_settings or {}), tokenizer, **settings)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ConfigError(
            f"A {name} cannot be built of {tokenizer_name!r} and {settings!r}: "
            f"{str(error).strip().partition(chr(10))[0]}. Give the settings of its own files."
        ) from error


def digest_of_processor(processor: Any) -> str:
    """Returns a hash of all that decides the tokens that a processor makes."""
    images = processor.image_processor
    own = {
        name: value
        for name, value in sorted(vars(processor).items())
        if isinstance(value, (str, int, float, bool, list, dict, type(None)))
    }
    content = [
        *(type(one).__name__ for one in (processor, images)),
        {**own, "images": json.loads(images.to_json_string())},
        digest_of_tokenizer(processor.tokenizer),
    ]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

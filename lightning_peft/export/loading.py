"""Loading of a base with adapters, quantized as in training or otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lightning_peft import engine
from lightning_peft.errors import ConfigError, UnsupportedError, first_line
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base
from lightning_peft.export.loading_code import keys_in

log = logging.getLogger(__name__)

# Names of the classes of transformers that see images and write text.
IMAGE_TEXT_CLASSES = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
_LANGUAGE_CLASSES = frozenset(
    one
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    for one in ([value] if isinstance(value, str) else value)
)
# What the modules of a class of text alone begin with.
_OF_TEXT = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


@dataclass
class LoadedModel:
    """A model with adapters, in eval mode; ``notes`` are what a user should know."""

    model: Any
    tokenizer: Any
    notes: list[str] = field(default_factory=list)


def select_device(name: str) -> torch.device:
    """Returns the device that ``name`` means: ``"auto"``, ``"cpu"`` or ``"cuda"``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here. Use 'cpu' or 'auto'.")
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", 0) if cuda else torch.device("cpu")


def load_tokenizer(base: Base) -> Any:
    """Returns the tokenizer of a base."""
    try:
        return AutoTokenizer.from_pretrained(base.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{base.name!r} has no tokenizer that can be read: {first_line(error)}"
        ) from error


def load_model(base: Base, adapter: Adapter | None, dtype: torch.dtype | str) -> Any:
    """Returns the plain base in eval mode, in the class that ``adapter`` was trained on."""
    cls: Any = getattr(transformers, str(class_name(base, adapter)), AutoModelForCausalLM)
    config, text = base.config, base.config.get_text_config()
    if isinstance(text, getattr(cls, "config_class", None) or ()):
        # The class of text alone takes that part of the configuration.
        config = text
    model = engine.load_pretrained_model(cls, base.folder, config=config, dtype=dtype)
    return model.eval()


def class_name(base: Base, adapter: Adapter | None) -> str | None:
    """Returns the class of the base, ``None`` where ``AutoModelForCausalLM`` is to choose it.

    It is what the adapter records, or its weights show: for one configuration there can be a class
    of text alone and one that sees images, whose modules have other names.
    """
    named = next((n for n in base.config.architectures or [] if n in IMAGE_TEXT_CLASSES), None)
    if adapter is None:
        return named
    recorded = adapter.base.get("class") or (adapter.config.get("auto_mapping") or {}).get(
        "base_model_class"
    )
    if recorded is not None or named is None:
        return recorded
    return None if all(key.startswith(_OF_TEXT) for key in keys_in(adapter.folder)) else named


def writes_text(name: str) -> bool:
    """Whether a class is a language model, with or without images; yes for those of others."""
    known = name in _LANGUAGE_CLASSES | IMAGE_TEXT_CLASSES
    return known or not hasattr(transformers, name)


def dtype_in_training(adapter: Adapter) -> torch.dtype | str:
    """Returns the dtype in which the base of ``adapter`` was loaded, ``"auto"`` if not recorded."""
    name = adapter.base.get("dtype")
    return getattr(torch, name) if name else "auto"


def load_as_trained(base: Base, adapter: Adapter, *, check_base: bool = True) -> nn.Module:
    """Returns the base, quantized as in training, with the adapter on it, on the CPU."""
    model: nn.Module = load_model(base, adapter, dtype_in_training(adapter))
    engine.load_adapter(
        model,
        adapter.folder,
        check_base=check_base,
        quantization_config=adapter.quantization,
    )
    return model


def load_with_adapters(
    base: Base,
    adapters: Sequence[Adapter],
    *,
    bits: int | None = None,
    device: torch.device,
    check_base: bool = True,
) -> LoadedModel:
    """Loads a causal language model once, with several adapters between which to switch.

    ``bits`` are 16, 8 or 4: as an adapter of so many bits was trained, or else bitsandbytes' int8
    and NF4; by default what the first adapter was trained on.
    """
    base_bits = bits or (adapters[0].bits if adapters else 16)
    settings = _settings(adapters, base_bits)
    dtype = dtype_in_training(adapters[0]) if adapters else "auto"
    check_generates(adapters)
    with _quantized_on_load(settings, device, adapters):
        model = load_model(base, adapters[0] if adapters else None, dtype)
    for adapter in adapters:
        engine.load_adapter(
            model,
            adapter.folder,
            adapter_name=adapter.name,
            check_base=check_base,
            quantization_config=settings,
        )
    model.to(device)
    notes = [
        f"{a.name} was trained on a {a.bits}-bit base, and this one has {base_bits} bits: its "
        "answers may differ from those in training"
        for a in adapters
        if a.bits != base_bits
    ]
    notes += [
        f"{a.name} was merged into {len(a.merged_layers)} layers in training, whose weights are in "
        "its folder: these layers are dense here"
        for a in adapters
        if settings is not None and a.merged_layers
    ]
    notes += [
        f"{a.name} does not record its base, so whether it is this one was not checked"
        for a in adapters
        if not a.base.get("fingerprint")
    ]
    return LoadedModel(model.eval(), load_tokenizer(base), notes)


def _quantized_on_load(
    settings: Any | None, device: torch.device, adapters: Sequence[Adapter]
) -> AbstractContextManager[Any]:
    """A context in which weights are quantized as they are read, where that saves memory."""
    backend = None if settings is None else engine.backend_for(settings)
    if backend is None or device.type == "cpu" or not backend.quantizes_on_load:
        return nullcontext()
    dense = backend.skip_modules(settings)
    for a in adapters:
        dense += a.facts.get("modules_to_save") or a.config.get("modules_to_save") or []
        dense += a.merged_layers
    dense_experts = any(engine.experts_were_dense(adapter.facts) for adapter in adapters)
    return engine.quantize_on_load(settings, device, dense, dense_experts=dense_experts)


def check_generates(adapters: Sequence[Adapter]) -> None:
    """Refuses adapters of models that generate no text."""
    for adapter in adapters:
        name = str(adapter.base.get("class"))
        cls: Any = getattr(transformers, name, None)
        if isinstance(cls, type) and not getattr(cls, "can_generate", lambda: True)():
            raise UnsupportedError(
                f"{adapter.name} was trained on a {name}, which generates no text. Use it in "
                "Python: lightning_peft.load_adapter on the model."
            )


def _settings(adapters: Sequence[Adapter], bits: int) -> Any | None:
    """Returns how a base of so many bits is quantized: as for an adapter, where one has as many."""
    same = next((adapter for adapter in adapters if adapter.bits == bits), None)
    if same is not None or bits == 16:
        return same and same.quantization
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits}: 16, 8 or 4.")
    return engine.quantization_config(load_in_8bit=bits == 8)

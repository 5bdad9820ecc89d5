"""Private parts of transformers: loading, and attributes of models and configs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, conversion_mapping

# Public alternative: none. The modules are new in transformers 5, and no page describes them.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps as ConversionOps
from transformers.core_model_loading import WeightConverter as WeightConverter
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import dot_natural_key as dot_natural_key
from transformers.core_model_loading import rename_source_key as rename_source_key
from transformers.core_model_loading import revert_weight_conversion

# Public alternative: none; models name a loss by `loss_type`.
from transformers.loss.loss_utils import LOSS_MAPPING as LOSS_MAPPING
from transformers.loss.loss_utils import ForCausalLMLoss as ForCausalLMLoss

# Public alternative: `PreTrainedModel.supports_gradient_checkpointing`, which names no blocks.
from transformers.modeling_layers import GradientCheckpointingLayer as GradientCheckpointingLayer

# Documented as the way to add a quantization method, and imported from here by its page.
from transformers.quantizers.base import HfQuantizer as HfQuantizer
from transformers.utils import cached_file

# Keys of configs as dictionaries, and an argument of `from_pretrained`.
NAME_KEY, COMMIT_KEY = "_name_or_path", "_commit_hash"
# The function by which a block is checkpointed; `gradient_checkpointing_enable` sets it.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"

weight_conversions: Any = get_model_conversion_mapping


def has_registered_conversions(model: PreTrainedModel) -> bool:
    """Whether the user registered how tensors of files become those of the model, or of a part."""
    registered: set[str] = getattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    models = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    return any({type(one).__name__, one.config.model_type} & registered for one in models)


def tensors_as_saved(model: Any, conversions: list[Any], state: dict[str, Any]) -> dict[str, Any]:
    """Returns tensors of a model as its files have them, by their keys there.

    Args:
        model: A model that ``from_pretrained`` did not make.
        conversions: Those of :func:`weight_conversions`, after the names of all tensors in the
            files went through :func:`rename_source_key`.
        state: Some of the model's tensors, by name.
    """
    # What `from_pretrained` leaves for `save_pretrained`.
    model._weight_conversions = [one for one in conversions if one.was_used()]
    saved: dict[str, Any] = revert_weight_conversion(model, state)
    return saved


def origin_of(config: Any) -> tuple[str | None, str | None]:
    """Returns the name or path that a config was loaded from, and its revision on the Hub."""
    return getattr(config, NAME_KEY, None) or None, getattr(config, COMMIT_KEY, None)


def attention_implementation(config: Any) -> str | None:
    """Returns the attention that a model was loaded with.

    Public alternative: ``config.attn_implementation``, which is for writing only.
    """
    return getattr(config, "_attn_implementation", None)


def tied_weights(model: Any) -> dict[str, str]:
    """Returns the tensor that each tied one takes its values from, both by name.

    The model's own mapping: what is removed is not tied again. Public alternative: none.
    """
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied


def causal_lm_class(config: Any) -> Any:
    """Returns the class that ``AutoModelForCausalLM`` makes for a config, or ``None``."""
    return transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)


def model_from_config(model_class: Any, config: Any, dtype: Any) -> Any:
    """Returns a model of a class that is not an Auto class, with weights of ``dtype``.

    Public alternative: ``from_config`` of the Auto classes, which choose the class themselves.
    """
    return model_class._from_config(config, dtype=dtype)


def own_loss_function(model: nn.Module) -> Any:
    """Returns the loss function set on a model; ``None`` where its type decides."""
    return vars(model).get("_loss_function")


def reset_loss_function(model: Any) -> None:
    """Lets the type of a model decide its loss again."""
    del model._loss_function


def float32_modules(model: Any) -> set[str]:
    """Returns parts of names whose tensors transformers keeps in float32."""
    lists = (getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
    return {name for names in lists for name in names or ()}


def enable_gradient_checkpointing(model: Any, **arguments: Any) -> None:
    """Switches on a model's own gradient checkpointing.

    transformers 5.20 renamed the method, and warns of the old name.
    """
    switch = getattr(model, "activation_checkpointing_enable", None)
    (switch or model.gradient_checkpointing_enable)(arguments or None)


def tied_parameters(model: Any) -> set[str]:
    """Returns the names of parameters that are tied to others, and of those."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for pair in dict(tied).items() for name in pair}


def file_on_this_machine(name: str, file: str, **where: Any) -> Path | None:
    """Returns the path of a model's file in the cache of the Hub; ``None`` if it is not there.

    Public alternative: ``huggingface_hub.try_to_load_from_cache``, which takes no ``token``.
    """
    found = cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    return None if found is None else Path(found)


def skip_while_loading(model: Any, names: Iterable[str]) -> Callable[[], None]:
    """Makes ``from_pretrained`` pass over parameters, neither read nor initialized.

    Returns:
        What undoes it, to call after loading.
    """
    hidden = set(names)
    for name in hidden:
        model.get_parameter(name)._is_hf_initialized = True

    def hide(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in hidden:
            state.pop(prefix + name, None)

    ignored = model._keys_to_ignore_on_load_unexpected
    inner = f"{model.base_model_prefix}."
    model._keys_to_ignore_on_load_unexpected = {
        *(ignored or ()),
        *(rf"(^|\.){re.escape(name.removeprefix(inner))}$" for name in hidden),
    }
    hook = model.register_state_dict_post_hook(hide)

    def undo() -> None:
        hook.remove()
        model._keys_to_ignore_on_load_unexpected = ignored

    return undo


def forget_quantization(model: Any) -> None:
    """Takes off a model the marks that ``from_pretrained`` leaves where it quantized."""
    model.__dict__.pop("is_quantized", None)
    for child in model.modules():
        if isinstance(child, PreTrainedModel):
            child.config.__dict__.pop("_is_quantized", None)


def forget_stored_format(model: Any) -> None:
    """Takes off a model, dense now, how it was read from quantized files.

    ``save_pretrained`` reverts those conversions, and most quantizers cannot.
    """
    model.hf_quantizer.remove_quantization_config(model)
    forget_quantization(model)
    conversions = model.__dict__.get("_weight_conversions")
    if conversions is not None:
        model._weight_conversions = [
            one
            for one in conversions
            if not any(hasattr(step, "hf_quantizer") for step in getattr(one, "operations", ()))
        ]


def forget_peft_adapters(model: Any) -> None:
    """Takes off a model the marks of PEFT's adapters, which ``add_adapter`` and PEFT leave."""
    model.__dict__.pop("peft_config", None)
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False


_lock = threading.Lock()
_interceptors = 0
_original: Any = None


@contextmanager
def intercepted_from_pretrained(handler: Callable[..., Any]) -> Iterator[None]:
    """Within the body, ``from_pretrained`` of all models is ``handler``, in all threads.

    Public alternative: none; a module's ``configure_model`` calls what it likes.

    Args:
        handler: Called with the original function, the class and the arguments. Bodies in several
            threads have to pass the same one.
    """
    global _interceptors, _original
    with _lock:
        _interceptors += 1
        if _interceptors == 1:
            _original = PreTrainedModel.__dict__["from_pretrained"]
            function = _original.__func__

            @wraps(function)
            def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
                return handler(function, cls, *args, **kwargs)

            PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        with _lock:
            _interceptors -= 1
            if _interceptors == 0:
                PreTrainedModel.from_pretrained = _original  # type: ignore[method-assign]


# Public alternative: none. Generation reads the same attribute.
def is_recurrent(model: Any) -> bool:
    """Whether a model's state cannot leave out tokens that are already in it, such as padding."""
    return bool(getattr(model, "_is_stateful", False))

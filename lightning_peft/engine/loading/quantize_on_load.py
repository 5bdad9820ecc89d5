"""Loading of transformers models with quantization, one tensor at a time.

transformers' own 4-bit loading keeps freed memory (see ``release_freed_memory``), replaces layers,
and forgets what a base fingerprint is made of. This is its extension point for other methods.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lightning_peft.compat.transformers import intercepted_from_pretrained
from lightning_peft.engine.backends.conversion import release_freed_memory
from lightning_peft.engine.backends.packed import current_share
from lightning_peft.engine.backends.registry import backend_for, storage_bytes
from lightning_peft.engine.fingerprint import Fingerprint, checksum
from lightning_peft.engine.layers.expert_weights import layer_name
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.loading import quantized_cache
from lightning_peft.engine.loading.gguf_model import GgufModel, read_gguf_folder
from lightning_peft.engine.loading.gguf_tensors import gguf_tensors
from lightning_peft.engine.loading.kept_bases import unused_base_dropped
from lightning_peft.engine.loading.quantized_cache import CachedLoad
from lightning_peft.engine.loading.streamed_quantizer import Loading, StreamedConfig, dense_info
from lightning_peft.engine.loading.tracked_loads import (
    check_replaced,
    drop_modified,
    restore_dense,
    track_load,
)
from lightning_peft.engine.momentum_copies import find_momentum_copies
from lightning_peft.engine.record import record_of
from lightning_peft.engine.selection.parts import find_heads
from lightning_peft.engine.selection.scope import select
from lightning_peft.errors import UnsupportedError, itemize

# Arguments by which the caller chooses devices or quantization; such loads are left alone.
_EXPLICIT_OPTIONS = (
    *("quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file", "state_dict"),
    *("device_map", "device_mesh", "distributed_config", "tp_plan", "tp_size"),
)
# Of a model, the hash of the GGUF file that it was loaded from.
GGUF_HASH = "gguf_sha256"

_current: ContextVar[Loading | None] = ContextVar("quantize_on_load", default=None)


@contextmanager
def quantize_on_load(
    settings: Any,
    device: torch.device,
    dense: list[str],
    cached: bool = False,
    dense_experts: bool = False,
) -> Iterator[Loading]:
    """Within the body, ``from_pretrained`` of this thread quantizes linear layers as it reads them.

    Only where its arguments choose no quantization, devices or distribution, the file is not
    quantized already, and it saves memory. Heads, output embeddings and tied layers stay dense.

    Args:
        settings: The config of a quantization backend.
        device: Where the model goes.
        dense: Names of further modules that stay dense; parts of names count too.
        cached: Take codes from the cache of quantized bases, and note what may go into it.
        dense_experts: Leave weights of experts dense.

    Yields:
        What was loaded.
    """
    loading = Loading(settings, device, dense, cached, dense_experts)
    token = _current.set(loading)
    try:
        with intercepted_from_pretrained(from_pretrained):
            yield loading
    finally:
        _current.reset(token)


@contextmanager
def loading_for_injection(
    module: nn.Module,
    peft_config: Any,
    settings: Any | None,
    adapt: Any,
    device: torch.device,
    cached: bool = False,
) -> Iterator[Loading | None]:
    """Within the body, models are loaded as the injection that follows would quantize them.

    Not for backends that quantize afterwards, for initialisations that need the dense weight, for
    modules with adapters, and where ``adapt`` names parts, which are not known before they are
    built.

    Yields:
        What was loaded, for :func:`store_quantized` after the injection; ``None`` for nothing.
    """
    init = getattr(peft_config, "init_lora_weights", True)
    needs_dense = init not in (True, False, "gaussian", "eva")
    backend = None if settings is None else backend_for(settings)
    streams = backend is not None and backend.quantizes_on_load
    if backend is None or not streams or adapt or needs_dense or record_of(module):
        with unused_base_dropped():
            yield None
        return
    dense = [
        *backend.skip_modules(settings),
        *(getattr(peft_config, "modules_to_save", None) or []),
    ]
    with unused_base_dropped(), quantize_on_load(settings, device, dense, cached) as loading:
        yield loading
    check_loaded(module, loading)


def from_pretrained(
    original: Any, cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
) -> Any:
    """``from_pretrained`` of a model within :func:`quantize_on_load`, and for GGUF files."""
    name = pretrained_model_name_or_path
    loading = _current.get()
    gguf = read_gguf_folder(name)
    if gguf is not None:
        original = partial(_from_gguf, original, gguf)
    explicit = any(kwargs.get(key) is not None for key in _EXPLICIT_OPTIONS)
    if loading is None or explicit or _is_quantized(name, kwargs):
        return original(cls, name, *args, **kwargs)
    streams = _saves_memory(loading, name, kwargs)
    cached = None
    if loading.cached and not args:
        way = "while it is read" if streams else "after loading"
        cached = quantized_cache.find_entry(
            cls, name, kwargs, loading.settings, loading.dense, way, loading.device
        )
    return _load(original, loading, cached, streams, cls, name, *args, **kwargs)


def _from_gguf(
    original: Any, gguf: GgufModel, cls: Any, name: Any, *args: Any, **kwargs: Any
) -> Any:
    """Loads a model with the tensors of a GGUF file, each of which is dequantized as it is read."""
    config: Any = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config, kwargs = cls.config_class.from_pretrained(
            name if config is None else config, return_unused_kwargs=True, **kwargs
        )
    with torch.device("meta"):
        outline = cls(copy.deepcopy(config))
    outline.tie_weights()
    tensors = gguf_tensors(gguf, outline)
    return original(cls, None, *args, config=config, state_dict=tensors, **kwargs)


def _load(
    original: Any,
    loading: Loading,
    cached: CachedLoad | None,
    streams: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    own = dict(kwargs)
    if streams or (cached is not None and cached.weights):
        kwargs["quantization_config"] = StreamedConfig(loading, streams, cached)
        # Of the dense rest, a part goes to the device later.
        place = loading.device if current_share() is None else torch.device("cpu")
        kwargs["device_map"] = {"": place}
    if cached is None:
        result = original(*args, **kwargs)
    else:
        before = len(loading.layers)
        result, info = original(*args, **kwargs, output_loading_info=True)
        on_load = dict(loading.layers[before:])
        absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}

        devices = [loading.device] if loading.device.type == "cuda" else []

        def reload_dense() -> Any:
            with torch.random.fork_rng(devices):
                return original(*args, **own)

        track_load(cached, result, on_load, absent, loading)
        cached.reload_dense = reload_dense
        loading.loads.append(cached)
    if streams and loading.device.type == "cpu":
        release_freed_memory()
    return result


def _config_dicts(name: Any, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the configuration in the file, and those of its parts.

    A config object that is passed on counts instead.
    """
    where = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
    try:
        written, _ = PreTrainedConfig.get_config_dict(
            name, **{key: kwargs[key] for key in where if key in kwargs}
        )
    except OSError:
        # Weights alone; the config was given.
        return []
    return [written, *(value for value in written.values() if isinstance(value, dict))]


def _is_quantized(name: Any, kwargs: dict[str, Any]) -> bool:
    given: Any = kwargs.get("config")
    return getattr(given, "quantization_config", None) is not None or any(
        "quantization_config" in part for part in _config_dicts(name, kwargs)
    )


def _saves_memory(loading: Loading, name: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this takes less memory than to load dense weights and quantize them then.

    Not on the CPU in the dtype of the file: such weights stay in the memory-mapped file until they
    are quantized one by one, and the fingerprint is taken before there are others (measured).
    """
    # A tensor of a GGUF file is in memory once it is dequantized.
    if loading.device.type != "cpu" or read_gguf_folder(name) is not None:
        return True
    parts = _config_dicts(name, kwargs)
    wanted = _dtype_name(kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto")
    if wanted == "auto":
        # Auto classes write a dtype that is named into the config.
        wanted = _dtype_name(getattr(kwargs.get("config"), "dtype", None) or "auto")
    stored = next(
        (_dtype_name(p[k]) for p in parts for k in ("dtype", "torch_dtype") if p.get(k)), None
    )
    return wanted not in ("auto", stored)


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def check_loaded(module: nn.Module, loading: Loading) -> None:
    """Checks that what was quantized while it was loaded is what injection would quantize."""
    check_replaced(loading)
    drop_modified(loading)
    quantizable_layers: set[int] = set()
    chosen = select(module, momentum_copies=find_momentum_copies(module) if loading.layers else ())
    for part in chosen.parts.values():
        heads = find_heads(part, chosen.exclusions).values()
        dense = {*chosen.exclusions.left, *(child for head in heads for child in head.modules())}
        quantizable_layers |= {id(child) for child in part.modules() if child not in dense}
    others = restore_dense(loading, quantizable_layers)
    if others:
        raise UnsupportedError(
            "from_pretrained in configure_model quantized these layers as it loaded them, and "
            f"{type(module).__name__} does not have them in its adapted parts, or has them as "
            "heads, or froze them while others train:"
            + itemize(others, 5)
            + "\nPass device_map={'': 'cpu'} to that from_pretrained: then it loads dense weights, "
            "and what is to be quantized is quantized afterwards."
        )


def dense_bytes(layer: nn.Module) -> int:
    """Returns the bytes of a layer's weight before it was quantized."""
    facts = dense_info(layer)
    return facts.bytes if facts else storage_bytes(stored_parameter(layer))


def base_fingerprint(part: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Returns the fingerprint of tensors of ``part`` as if all had been loaded dense."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    streamed = False
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        experts = layer_name(leaf) in part.get_submodule(owner)._modules
        known = None
        if experts or leaf == "weight":
            known = dense_info(part.get_submodule(layer_name(name) if experts else owner))
        if known is None:
            found[name] = tuple(tensor.shape), checksum(tensor)
        else:
            found[name], streamed = (known.shape, known.checksum), True
    if streamed:
        # Nothing is quantized after this, which would do it.
        release_freed_memory()
    return Fingerprint(found)

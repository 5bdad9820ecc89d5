"""Cache of quantized bases on disk.

Kept are the codes and constants of quantized layers. All else of a model, the dense parts, comes
from its own files as always, so that an entry can never be taken for the model of other files.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from lightning_peft.compat.transformers import COMMIT_KEY, NAME_KEY
from lightning_peft.engine import cache_entries
from lightning_peft.engine.backends.packed import current_share
from lightning_peft.engine.backends.registry import (
    Backend,
    backend_for,
    backend_of,
    storage_bytes,
)
from lightning_peft.engine.loading.kept_bases import kept_weights
from lightning_peft.engine.loading.weight_files import find_weight_files, hashes, stamps

# Raised whenever an entry is written, or its layers are chosen, in another way.
FORMAT = 3
KIND = "quantized base"
# Bytes of codes below which a second start would gain nothing that a user could notice.
SMALLEST = 16 << 20
# safetensors copies what it writes to memory, so not all at once.
_SHARD = 128 << 20
# What these do is not in the key, or not with these files.
_NOT_COVERED = (
    "subfolder",
    "variant",
    "key_mapping",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "force_download",
    "from_tf",
    "from_flax",
)
# Where files come from, which their hash makes up for.
_WHERE = ("cache_dir", "token", "local_files_only", "revision", "code_revision", COMMIT_KEY)
_PLAIN = (type(None), bool, int, float, str, torch.dtype)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseInfo:
    """A dense weight before it was quantized, as the record of a base has it."""

    checksum: int
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CachedWeight:
    """A quantized weight.

    Attributes:
        stored: The parameter.
        facts: What it was.
        deferred: Whether it would be dense after loading, and quantized when adapters are added.
    """

    stored: Any
    facts: DenseInfo
    deferred: bool


@dataclass
class CachedLoad:
    """One call of ``from_pretrained``, and the entry that it decides.

    Attributes:
        final: Folder of the entry.
        name: What the user calls the model.
        options: Other arguments of the call.
        files: The weight files.
        stamps: What those looked like before they were hashed.
        about: What a list of entries shows.
        weights: The weights of the entry by the names of their layers; empty if there is none.
        model: What the call returned.
        on_load: The quantized weights that it came with, by the same names.
        deferred: Checksums of weights that are dense after loading, by the same.
        reload_dense: Loads the same dense, for layers that turn out not to be adapted.
    """

    final: Path
    name: str
    options: dict[str, Any]
    files: list[Path]
    stamps: list[Any]
    about: dict[str, Any]
    weights: dict[str, CachedWeight] = field(default_factory=dict)
    model: Any = None
    on_load: dict[str, Any] = field(default_factory=dict)
    deferred: dict[str, int] = field(default_factory=dict)
    reload_dense: Any = None

    def unchanged(self, files: Iterable[Any] | None = None) -> bool:
        """Whether a load reads the files that were hashed, as they were then."""
        wanted = find_weight_files(self.name, self.options) if files is None else files
        try:
            return [Path(file).resolve() for file in wanted] == self.files and (
                stamps(self.files) == self.stamps
            )
        except OSError:
            return False


@dataclass(frozen=True)
class CacheEntry:
    """A new entry: where it is, and its bytes."""

    folder: Path
    size: int


def find_entry(
    cls: type,
    name: Any,
    options: Mapping[str, Any],
    quantization: Any,
    dense: Iterable[str],
    way: str,
    device: torch.device,
) -> CachedLoad | None:
    """Finds and reads the entry that a call decides; ``None`` where the cache does not serve it."""
    plain = _serializable_options(options)
    files = find_weight_files(name, options) if plain is not None else []
    if plain is None or not files:
        return None
    folder = cache_entries.cache_root() / "bases"
    try:
        before = stamps(files)
        sums = hashes(files, folder.with_name("hashes"))
        where = {key: options[key] for key in ("revision", "token") if options.get(key) is not None}
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
    except OSError as error:
        log.warning("No quantized base can be kept for %s: %s.", name, error)
        return None
    packages = ("bitsandbytes", "torch", "transformers")
    backend = backend_for(quantization)
    fields = backend.codes_settings(quantization)
    about = {
        "model": str(name),
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "label": backend.label(fields),
        "settings": {"quant_method": backend.name, **fields, "dense": sorted(dense), "way": way},
        # Kernels of another card may round in another way.
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {package: version(package) for package in packages},
    }
    # What a list of entries calls the model and its quantization does not decide anything.
    decisive = {key: value for key, value in about.items() if key not in ("model", "label")}
    key = cache_entries.key_of(format=FORMAT, **decisive, options=plain, config=config, files=sums)
    load = CachedLoad(folder / key, str(name), dict(options), files, before, about)
    # Memory-mapped until a process has taken its part.
    place = device if current_share() is None else torch.device("cpu")
    read = partial(_read, load.final, backend, place)
    load.weights = kept_weights(load.final, backend, place, read)
    return load


def _serializable_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the arguments that decide what is loaded; ``None`` where that cannot be said."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key == "adapter_kwargs":
            # Always there; only set where adapters are loaded as well.
            value = {name: given for name, given in (value or {}).items() if name not in _WHERE}
            if any(given is not None for given in value.values()):
                return None
            continue
        if key in _NOT_COVERED and value:
            return None
        if key == "use_safetensors" and value is False:
            return None
        if isinstance(value, PreTrainedConfig):
            found[key] = json.loads(value.to_json_string(use_diff=False))
            # The name under which it was found.
            found[key].pop(NAME_KEY, None)
        elif key not in _WHERE and value is not None:
            if not isinstance(value, _PLAIN):
                return None
            found[key] = str(value)
    return found


def _read(final: Path, backend: Backend, device: torch.device) -> dict[str, CachedWeight]:
    summary = cache_entries.find(final, KIND)
    if summary is None:
        return {}
    try:
        return _weights(final, summary["layers"], backend, device)
    except (OSError, ValueError, KeyError, AssertionError, SafetensorError) as error:
        cache_entries.discard(final, KIND, str(error))
        return {}


def _weights(
    final: Path, layers: dict[str, Any], backend: Backend, device: torch.device
) -> dict[str, CachedWeight]:
    stored: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for path in sorted(final.glob("*.safetensors")):
        # Memory-mapped: several processes share the pages.
        with safe_open(path, framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, part = key.partition("|")
                stored[name][part] = file.get_tensor(key)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        sums = dict(zip(stored, pool.map(_crc_of_parts, stored.values()), strict=True))
    wrong = [name for name, facts in layers.items() if sums[name] != facts["crc"]]
    if wrong:
        raise ValueError(f"the codes of {wrong[0]} are not those that were written")
    return {
        name: CachedWeight(
            backend.from_state_tensors(stored[name], device),
            DenseInfo(facts["checksum"], tuple(facts["shape"]), facts["bytes"]),
            facts["late"],
        )
        for name, facts in layers.items()
    }


def size_to_keep(load: CachedLoad, weights: Mapping[str, CachedWeight]) -> int:
    """Bytes of weights, whose values are not read; 0 where they are not worth an entry."""
    size = sum(storage_bytes(weight.stored) for weight in weights.values())
    return size if size >= SMALLEST and not load.final.exists() and load.unchanged() else 0


def store(load: CachedLoad, weights: Mapping[str, CachedWeight], size: int) -> CacheEntry | None:
    """Writes the entry of a load, if there is room.

    Nothing that goes wrong here stops a run. ``weights`` are those that are quantized now, by the
    names of their layers, and ``size`` is that of :func:`size_to_keep`.
    """
    if not size:
        return None
    folder = load.final.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not cache_entries.has_room(folder, size):
            log.warning(
                "The quantized base of %s (%.1f GB) is not kept for the next start: the disk of "
                "%s would be nearly full.",
                load.name,
                size / 1e9,
                folder,
            )
            return None
        cache_entries.make(load.final, lambda working: _write(working, load, weights))
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a disk, or a quota, that is full.
        log.warning("The quantized base of %s is not kept: %s.", load.name, error)
        return None
    return CacheEntry(load.final, size)


def _write(working: Path, load: CachedLoad, weights: Mapping[str, CachedWeight]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for number, shard in enumerate(_shards(weights)):
        tensors: dict[str, Tensor] = {}
        for name, parts in shard.items():
            weight = weights[name]
            facts[name] = {
                **asdict(weight.facts),
                "late": weight.deferred,
                "crc": _crc_of_parts(parts),
            }
            tensors |= {f"{name}|{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, working / f"codes-{number:05d}.safetensors")
    return {**load.about, "layers": facts}


def _shards(
    weights: Mapping[str, CachedWeight],
) -> Iterator[dict[str, dict[str, Tensor]]]:
    shard: dict[str, dict[str, Tensor]] = {}
    size = 0
    for name, weight in weights.items():
        stored = weight.stored
        backend = backend_of(stored)
        assert backend is not None
        parts = backend.state_tensors(stored)
        shard[name] = {part: tensor.cpu().contiguous() for part, tensor in parts.items()}
        size += storage_bytes(stored)
        if size >= _SHARD:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def crc(tensor: Tensor, start: int = 0) -> int:
    """Returns a checksum of the bits of a tensor."""
    octets = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    return zlib.crc32(octets.numpy().data, start)


def _crc_of_parts(parts: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(parts):
        total = crc(parts[name], zlib.crc32(name.encode(), total))
    return total

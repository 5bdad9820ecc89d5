"""Tracking of loaded models until injection.

Codes go into the cache only if they are certainly those of the file: nobody changed the weight
between loading and quantizing. Where codes came out of it, what the user does to the layers until
the injection must be what it would be without them, or be refused.
"""

from __future__ import annotations

import os

from torch import nn
from transformers import PreTrainedModel

from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.packed import current_share
from lightning_peft.engine.backends.registry import backend_for
from lightning_peft.engine.gathering import group_size
from lightning_peft.engine.layers.expert_weights import (
    exposed_experts,
    layer_name,
    weight_name,
    withdraw_experts,
)
from lightning_peft.engine.layers.mixin import stored_parameter
from lightning_peft.engine.loading import quantized_cache
from lightning_peft.engine.loading.quantized_cache import (
    CachedLoad,
    CachedWeight,
    CacheEntry,
    DenseInfo,
)
from lightning_peft.engine.loading.shared_store import GatheredWeights, writers
from lightning_peft.engine.loading.streamed_quantizer import (
    Loading,
    covered_by_cache,
    deferred_dtype,
    dense_info,
    quantizable,
    restore_dense_layer,
)
from lightning_peft.engine.record import adapted_parts
from lightning_peft.errors import UnsupportedError, itemize


def track_load(
    load: CachedLoad,
    model: PreTrainedModel,
    on_load: dict[str, nn.Module],
    absent: set[str],
    loading: Loading,
) -> None:
    """Notes what came out of a load, so that changes before the injection are seen."""
    load.model = model
    if not covered_by_cache(model):
        return
    load.on_load = {name: stored_parameter(one) for name, one in on_load.items()}
    if not load.weights:
        backend = None if loading.dense_experts else backend_for(loading.settings)
        with exposed_experts(model):
            load.deferred = {
                name: quantized_cache.crc(stored_parameter(model.get_submodule(name)))
                for name in quantizable(model, loading.dense, backend)
                if weight_name(name) not in absent
            }


def check_replaced(loading: Loading) -> None:
    """Checks that nobody took the codes out of layers that would have been dense."""
    changed = [
        name
        for load in loading.loads
        for name, stored in load.on_load.items()
        if (layer := _layer(load.model, name)) is not None
        and deferred_dtype(layer) is not None
        and stored_parameter(layer) is not stored
    ]
    if changed:
        raise UnsupportedError(
            "configure_model replaced weights that came out of the cache quantized already, so "
            "that the change was made to rounded numbers:"
            + itemize(changed, 5)
            + "\nPass cache_quantized_base=False to the strategy or callback: then they are "
            "quantized afterwards."
        )


def drop_modified(loading: Loading) -> None:
    """Strikes out dense weights that are not those of the file any more."""
    for load in loading.loads:
        with exposed_experts(load.model):
            for name, total in list(load.deferred.items()):
                layer = _layer(load.model, name)
                if layer is None or quantized_cache.crc(stored_parameter(layer)) != total:
                    del load.deferred[name]


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def restore_dense(loading: Loading, quantizable_layers: set[int]) -> list[str]:
    """Gives dense weights back to layers that have codes only because the cache had them.

    Returns the names of the others that injection would not have quantized.
    """
    wrong = [(name, layer) for name, layer in loading.layers if id(layer) not in quantizable_layers]
    for load in loading.loads:
        mine = [(name, layer) for name, layer in wrong if _layer(load.model, name) is layer]
        deferred = {name: layer for name, layer in mine if deferred_dtype(layer) is not None}
        if not deferred:
            continue
        dense = load.reload_dense()
        with exposed_experts(dense):
            for name, layer in deferred.items():
                weight = stored_parameter(dense.get_submodule(name))
                restore_dense_layer(layer, weight.data)
        withdraw_experts(load.model)
    return [name for name, layer in wrong if dense_info(layer) is not None]


def store_quantized(module: nn.Module, loading: Loading | None) -> list[CacheEntry]:
    """Puts what was loaded and is quantized now into the cache, for the next start.

    ``module`` is as after the injection. Returns the new entries; one process for each machine
    writes them.
    """
    # Processes that SLURM starts have a name of its own for it.
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    writes = local == "0"
    if loading is None or not (writes or current_share()):
        return []
    sums = _checksums(module)
    known = [(load, _known_weights(load, sums)) for load in loading.loads if not load.weights]
    sizes = [quantized_cache.size_to_keep(*one) if writes else 0 for one in known]
    if current_share() is not None:
        return _store_shared(known, sizes)
    made = [quantized_cache.store(*one, size) for one, size in zip(known, sizes, strict=True)]
    return [entry for entry in made if entry]


def _store_shared(
    known: list[tuple[CachedLoad, dict[str, CachedWeight]]], sizes: list[int]
) -> list[CacheEntry]:
    kept = []
    names = [(load.final.name, [*found]) for load, found in known]
    # Also those that share another copy of the base: each group puts its own together.
    written = writers(names, sizes, group_size())
    for (load, found), size, anyone in zip(known, sizes, written, strict=True):
        if anyone:
            gathered = GatheredWeights(
                found, {name: load.model.get_submodule(name) for name in found}
            )
            try:
                entry = quantized_cache.store(load, gathered, size)
            finally:
                # Whatever happens here, the others wait for its parts.
                gathered.finish()
            kept += [entry] if entry else []
    return kept


def _known_weights(load: CachedLoad, sums: dict[int, int]) -> dict[str, CachedWeight]:
    known: dict[str, CachedWeight] = {}
    for name in (*load.on_load, *load.deferred):
        layer = _layer(load.model, name)
        if not isinstance(layer, QuantizedLayer):
            continue
        stored, described = stored_parameter(layer), layer.described_weight()
        deferred = name in load.deferred
        facts = dense_info(layer)
        if deferred and id(layer) in sums:
            shape, dtype = layer.weight_info()
            size = shape.numel() * dtype.itemsize
            known[name] = CachedWeight(
                described, DenseInfo(sums[id(layer)], tuple(shape), size), deferred
            )
        elif facts is not None and stored is load.on_load.get(name):
            known[name] = CachedWeight(described, facts, deferred)
    return known


def _checksums(module: nn.Module) -> dict[int, int]:
    """Returns the checksums of weights as they were before the injection, by their layers' ids."""
    found = {}
    for entry, part in adapted_parts(module):
        for tensor, (_, total) in entry.base.tensors.items():
            owner, _, leaf = tensor.rpartition(".")
            layer = _layer(part, owner if leaf == "weight" else layer_name(tensor))
            if layer is not None:
                found[id(layer)] = total
    return found

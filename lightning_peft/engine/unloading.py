"""Removal of all adapters from a module."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lightning_peft.compat.peft import BaseTuner, BaseTunerLayer
from lightning_peft.compat.transformers import forget_stored_format
from lightning_peft.engine.adapters import adapted_layers_of, is_merged
from lightning_peft.engine.backends.conversion import convert_to_dense, restore_quantized
from lightning_peft.engine.backends.layers import QuantizedLayer
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.engine.files.adapter_files import (
    refuse_saving_loaded_formats,
    restore_save_pretrained,
)
from lightning_peft.engine.layers.adapter import AdapterLayer, detach
from lightning_peft.engine.layers.expert_weights import withdraw_experts
from lightning_peft.engine.layers.tokens import untie_rows
from lightning_peft.engine.mergeable import outermost
from lightning_peft.engine.momentum_copies import unlink_copies
from lightning_peft.engine.record import adapted_parts, refuse_sharded, require_record, set_record
from lightning_peft.engine.training.causal_lm_loss import restore_causal_lm_loss
from lightning_peft.errors import LifecycleError, itemize


@torch.inference_mode(False)
@torch.no_grad()
def unload(module: nn.Module) -> nn.Module:
    """Takes all adapters off: layers get their classes back, and the record goes.

    After :func:`merge`, the module is an ordinary dense one with the adapter built in: layers
    that were quantized without an adapter are dequantized too. Without a merge, the base comes
    back as it was adapted, quantized layers included. Parameters stay frozen. The module itself
    is changed, and returned for convenience. After an error it is as it was.

    Raises:
        LifecycleError: If the module has no adapters, or some active ones are merged and others
            are not.
    """
    record = require_record(module)
    refuse_sharded(module, "Unloading")
    layers = outermost(adapted_layers_of(module))
    merged = [layer for layer in layers.values() if is_merged(layer)]
    rest = [name for name, layer in layers.items() if _is_running(layer)]
    if merged and rest:
        raise LifecycleError(
            "Some active adapters are merged and others are not. Merge or unmerge all of them "
            "before unloading. Not merged:" + itemize(rest, 5)
        )
    if merged:
        _dequantize(module)
    for layer in layers.values():
        if isinstance(layer, AdapterLayer):
            detach(layer)
    untie_rows(module)
    withdraw_experts(module)
    for _, part in adapted_parts(module):
        _unwrap(part)
    unlink_copies(module, record.momentum_copies)
    restore_causal_lm_loss(module)
    restore_save_pretrained(module)
    if merged:
        _forget_quantization(module)
    refuse_saving_loaded_formats(module)
    set_record(module, None)
    return module


def _is_running(layer: Any) -> bool:
    if isinstance(layer, AdapterLayer):
        return bool(layer.effective_adapters())
    return bool(set(layer.active_adapters) - set(layer.merged_adapters))


def _dequantize(module: nn.Module) -> None:
    """Makes quantized layers dense: all of them, or none where memory does not last."""
    undo = []
    try:
        for child in list(module.modules()):
            if isinstance(child, QuantizedLayer):
                undo.append((child, convert_to_dense(child, child.effective_weight().contiguous())))
    except BaseException:
        for child, quantized in undo:
            restore_quantized(child, quantized)
        raise


def _forget_quantization(module: nn.Module) -> None:
    """Takes the config of a quantization off models that are dense now: none reads them with it."""
    for model in module.modules():
        quantizer = vars(model).get("hf_quantizer")
        if quantizer is not None and not any(map(is_quantized, model.modules())):
            forget_stored_format(model)


def _unwrap(part: nn.Module) -> None:
    for parent in list(part.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                base: Any = child.get_base_layer()
                base.__dict__.pop("before_merge", None)
                setattr(parent, name, base)
        if not isinstance(parent, (BaseTuner, PeftModel)):
            # Their own forward pass needs it.
            parent.__dict__.pop("peft_config", None)

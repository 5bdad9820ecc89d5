"""Turning a dense matrix into the 4-bit codes that bitsandbytes makes of it.

bitsandbytes' CPU quantization works on all of a matrix at once, with temporary memory of about ten
times the codes, which each layer takes from the system anew. Its blocks do not depend on one
another, so that a matrix can be quantized some blocks at a time, within the caches of a core.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import quantize_4bit, quantize_blockwise
from torch import Tensor
from transformers import BitsAndBytesConfig

# Weights at once: enough that calls cost nothing, and few enough to stay near a core (measured on a
# matrix of 2.9M: 0.8 of the time of all at once).
PIECE = 1 << 19
# Of the constants of blocks, with double quantization; bitsandbytes has no setting for it.
_NESTED_BLOCK = 256


def four_bit(rows: Tensor, config: BitsAndBytesConfig, device: torch.device) -> Any:
    """Returns the ``bitsandbytes.nn.Params4bit`` on ``device`` that stands for ``rows``.

    Args:
        rows: ``(out, in)``, float32, float16 or bfloat16.
        config: 4-bit settings.
        device: Where it is quantized, and stays.
    """
    double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    rows = rows.contiguous()
    kept: dict[str, Any] = {"requires_grad": False, "compress_statistics": double}
    if device.type != "cpu" or rows.numel() <= PIECE:
        packed: Any = bnb.nn.Params4bit(rows, quant_type=kind, **kept)
        return packed.to(device)
    codes, state = _by_pieces(rows.to(device), kind)
    if double:
        _compress(state)
    return bnb.nn.Params4bit(codes, quant_type=kind, quant_state=state, bnb_quantized=True, **kept)


def _by_pieces(rows: Tensor, kind: str) -> tuple[Tensor, Any]:
    """Returns what ``quantize_4bit`` does without double quantization, bit for bit."""
    flat = rows.detach().view(-1)
    codes = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=rows.device)
    constants: list[Tensor] = []
    for number, piece in enumerate(flat.split(PIECE)):
        packed, state = quantize_4bit(piece, quant_type=kind)
        start = number * PIECE // 2
        codes[start : start + len(packed)] = packed
        constants.append(state.absmax)
    state.absmax, state.shape = torch.cat(constants), rows.shape
    return codes, state


def _compress(state: Any) -> None:
    """Quantizes the constants of the blocks as ``quantize_4bit(compress_statistics=True)`` does."""
    state.offset = state.absmax.mean()
    state.absmax, state.state2 = quantize_blockwise(
        state.absmax - state.offset, blocksize=_NESTED_BLOCK
    )
    state.nested = True

"""NF4 quantization on the CPU with the codes of bitsandbytes, in less memory.

On CPUs bitsandbytes searches the code of each weight by bisection, one weight after the other, on
all of a matrix at once, with temporary memory of about ten times the codes. Here some blocks at a
time are compared with the 15 bounds between codes, which torch does for many weights at once: a
sixth of the time on a matrix of 2.9M, and the same codes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit, quantize_blockwise
from torch import Tensor
from torch.nn import functional as F

# Weights at once: enough that calls cost nothing, and few enough to stay near a core.
CHUNK = 1 << 19
# Of the weights and of their constants, with double quantization; bitsandbytes' defaults.
BLOCK, NESTED_BLOCK = 64, 256
# bitsandbytes' lower limit for the constant of a block.
_SMALLEST = 1e-38


def quantize_rows(rows: Tensor, kind: str, double: bool) -> tuple[Tensor, Any]:
    """What ``quantize_4bit`` makes of ``rows`` on a CPU, bit for bit: codes and their state.

    Args:
        rows: ``(out, in)``, float32, float16 or bfloat16, contiguous.
        kind: ``"nf4"`` or ``"fp4"``.
        double: Quantize the constants of blocks too.
    """
    flat = rows.detach().view(-1)
    codes = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8)
    constants = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32)
    encoder = _NF4Encoder(min(CHUNK, flat.numel())) if matches_bitsandbytes(kind) else None
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        end = start + len(chunk)
        codes_of_it = codes[start // 2 : (end + 1) // 2]
        constants_of_it = constants[start // BLOCK : -(-end // BLOCK)]
        if encoder is None or not encoder.quantize(chunk, codes_of_it.view(-1), constants_of_it):
            packed, state = quantize_4bit(chunk, blocksize=BLOCK, quant_type=kind)
            codes_of_it.copy_(packed)
            constants_of_it.copy_(state.absmax)
    # All but the numbers, as bitsandbytes makes it.
    state = quantize_4bit(flat[:1], blocksize=BLOCK, quant_type=kind)[1]
    state.absmax, state.shape = constants, rows.shape
    if double:
        _quantize_constants(state)
    return codes, state


class _NF4Encoder:
    """Quantizes to NF4 by comparing with all bounds; holds the memory that this takes."""

    def __init__(self, size: int) -> None:
        # Their dtype is said wherever memory is made: the default one may be the model's.
        memory = torch.empty(3, size, dtype=torch.float32)
        self.scaled, self.above, self.place = memory.unbind()
        self.codes = torch.empty(size, dtype=torch.uint8)

    def quantize(self, piece: Tensor, codes: Tensor, constants: Tensor) -> bool:
        """Fills in codes and constants, or returns ``False`` for what it does not cover.

        Args:
            piece: ``(n,)``, as they come.
            codes: ``(n / 2,)``, uint8.
            constants: ``(n / 64,)``, float32.
        """
        size = len(piece)
        if size % BLOCK:
            return False
        scaled, above, place = self.scaled[:size], self.above[:size], self.place[:size]
        scaled.copy_(piece)
        torch.abs(scaled, out=above)
        torch.amax(above.view(-1, BLOCK), dim=1, out=constants)
        if not constants.isfinite().all():
            return False
        scaled.view(-1, BLOCK).mul_((1.0 / constants.clamp(min=_SMALLEST)).unsqueeze(1))
        place.zero_()
        for bound in _bounds():
            # As numbers: torch writes truth values one after the other.
            place.add_(torch.gt(scaled, bound, out=above))
        pairs = self.codes[:size].copy_(place).view(torch.int16)
        # The first of two weights is the low byte there, and the high half in bitsandbytes.
        codes.copy_((pairs << 4) | (pairs >> 8))
        return True


@cache
def _bounds() -> list[float]:
    """Returns the values between neighbours of NF4."""
    levels = get_4bit_type("nf4", device="cpu")
    return list(((levels[:-1] + levels[1:]) / 2).tolist())


@cache
def matches_bitsandbytes(kind: str) -> bool:
    """Returns whether comparing gives the codes of the bitsandbytes that is installed.

    Tried once on the bounds themselves, their neighbours among the numbers, and values in between.
    """
    if kind != "nf4":
        return False
    single: dict[str, Any] = {"dtype": torch.float32}
    bounds = torch.tensor(_bounds(), **single)
    edges = [bounds.nextafter(torch.full_like(bounds, to)) for to in (-2.0, 2.0)]
    between = torch.linspace(-1, 1, 16 * (BLOCK - 1) - 45, **single)
    values = torch.cat([bounds, *edges, between])
    # The largest of a block is 1, so that scaling changes nothing.
    blocks = F.pad(values.view(-1, BLOCK - 1), (0, 1), value=1.0).view(-1)
    theirs, state = quantize_4bit(blocks, blocksize=BLOCK, quant_type=kind)
    mine, constants = torch.empty_like(theirs.view(-1)), torch.empty_like(state.absmax)
    made = _NF4Encoder(len(blocks)).quantize(blocks, mine, constants)
    return made and torch.equal(mine, theirs.view(-1)) and torch.equal(constants, state.absmax)


def _quantize_constants(state: Any) -> None:
    """Quantizes the constants of the blocks as ``quantize_4bit(compress_statistics=True)`` does."""
    state.offset = state.absmax.mean()
    state.absmax, state.state2 = quantize_blockwise(
        state.absmax - state.offset, blocksize=NESTED_BLOCK
    )
    state.nested = True

"""Fingerprint of a frozen base, cheap enough for every start.

Each tensor gets a 63-bit checksum of its values rounded to bfloat16, so that the same published
weights loaded in float32, float16 or bfloat16 count as the same base. It guards against mistakes,
not against an attacker: use file hashes for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.backends.registry import quantization_constants
from lightning_peft.engine.layers.mixin import stored_parameter

# The checksum of a tensor on the meta device: no real one is negative.
NO_VALUES = -1
_CHUNK = 1 << 22
_MASK = (1 << 63) - 1
# Of the weights of words: the first, and from one to the next.
_FIRST, _STEP = 0x632BE59BD9B4E01, 0x9E3779B97F4A7C1
# Words that stay in the caches of a core, with what is made of them; fewer than torch would share
# between threads, which wait for one another.
_CACHED = 24 << 10


@dataclass(frozen=True)
class Fingerprint:
    """Shapes and checksums of the frozen tensors of one adapted part.

    Attributes:
        tensors: Both by the names of parameters in the part, before anything was changed.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], int]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the part."""
        return tuple(self.tensors)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes, in this order."""
        return tuple(shape for shape, _ in self.tensors.values())

    @property
    def sums(self) -> tuple[int, ...]:
        """The checksums, in this order."""
        return tuple(total for _, total in self.tensors.values())

    def digest(self) -> str:
        """Returns one sha256 over names, shapes and checksums."""
        text = repr((self.names, self.shapes, self.sums))
        return hashlib.sha256(text.encode()).hexdigest()

    def only(self, chosen: Callable[[str], bool]) -> Fingerprint:
        """Returns the fingerprint of those tensors whose name ``chosen`` accepts."""
        return Fingerprint({name: held for name, held in self.tensors.items() if chosen(name)})

    def differences(self, sums: Iterable[int]) -> list[str]:
        """Returns the names of the tensors whose checksum is another one in ``sums``."""
        return [
            name
            for name, mine, other in zip(self.names, self.sums, sums, strict=True)
            if mine != other
        ]


def checksum(tensor: Tensor) -> int:
    """Returns a position-dependent 63-bit checksum of ``tensor`` and its quantization constants.

    The sum of the 32-bit words times odd 64-bit weights, modulo 2**63, in chunks so that the
    temporary memory stays near 100 MB whatever the size of the tensor. Floating-point values are
    rounded to bfloat16 first; integers, and the constants of quantized weights, are taken as they
    are.

    Returns:
        The checksum, or ``NO_VALUES`` for a tensor on the meta device.
    """
    if tensor.is_meta:
        return NO_VALUES
    values = tensor.detach()
    flat = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
    total = sum(_weighted_sum(constant) for constant in quantization_constants(tensor))
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        # No element has more than two words, so no two words of the tensor share an index.
        words_before = 2 * start
        rounded = chunk.to(torch.bfloat16) if chunk.is_floating_point() else chunk
        total += _weighted_sum(rounded, words_before)
    return total & _MASK


def exact_checksum(tensor: Tensor) -> int:
    """Returns a checksum of the bits of ``tensor`` and of its quantization constants.

    Unlike :func:`checksum` it distinguishes values that are equal in bfloat16.
    """
    if tensor.is_meta:
        return NO_VALUES
    total = sum(_weighted_sum(constant) for constant in quantization_constants(tensor))
    octets = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
    return (total + checksum(octets)) & _MASK


def buffer_checksums(part: nn.Module) -> dict[str, int]:
    """Returns :func:`exact_checksum` of every persistent buffer of ``part``, by name.

    Running statistics of batch norm are among them, which training changes.
    """
    kept = part.state_dict().keys()
    return {name: exact_checksum(b) for name, b in part.named_buffers() if name in kept}


def _weighted_sum(values: Tensor, start: int = 0) -> int:
    # Words of 32 bits: the highest bit of a 64-bit word, which is the sign of every fourth weight,
    # would stay where it is when multiplied, and an even number of changes would cancel.
    words = _words(values.reshape(-1).contiguous().view(torch.uint8))
    at_once = _CACHED if words.is_cpu else words.numel()
    steps = torch.arange(min(at_once, words.numel()), device=words.device) * _STEP
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for done in range(0, words.numel(), at_once):
        some = words[done : done + at_once]
        weights = steps[: len(some)] + _signed((start + done) * _STEP + _FIRST)
        total += weights.bitwise_or_(1).mul_(some).sum()
    return int(total.item())


def _words(octets: Tensor) -> Tensor:
    if octets.numel() % 4 or octets.storage_offset() % 4:
        octets = F.pad(octets, (0, -octets.numel() % 4))
    return octets.view(torch.int32)


def _signed(number: int) -> int:
    """Returns ``number`` modulo 2**64 as torch would wrap it around."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Returns the fingerprint of named tensors, in the order given."""
    return Fingerprint({name: (tuple(one.shape), checksum(one)) for name, one in tensors})


def stored_fingerprint(part: nn.Module, names: Iterable[str]) -> Fingerprint:
    """The fingerprint of stored weights of ``part``, codes included, as they are now."""
    owners = [(name, *name.rpartition(".")[::2]) for name in names]
    return fingerprint(
        (name, stored_parameter(part.get_submodule(owner), leaf)) for name, owner, leaf in owners
    )

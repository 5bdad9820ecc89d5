"""Bases differ by their weights, and published weights in other dtypes are the same base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_peft import engine
from lightning_peft.engine import fingerprint as module
from lightning_peft.engine.backends.conversion import quantize
from lightning_peft.engine.fingerprint import NO_VALUES, checksum, exact_checksum, fingerprint


def changed(tensor: Tensor, index: int, factor: float) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[index] *= factor
    return copy


@pytest.mark.parametrize("shape", [(1,), (7,), (64, 48), (3, 5, 7)], ids=str)
def test_one_changed_element_is_seen(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    for index in {0, tensor.numel() // 2, tensor.numel() - 1}:
        # A factor of 1.02 is more than half a unit in the last place of bfloat16 everywhere.
        assert checksum(changed(tensor, index, 1.02)) != checksum(tensor)
        assert checksum(changed(tensor, index, -1.0)) != checksum(tensor)
    assert checksum(tensor.clone()) == checksum(tensor)


def test_permuted_values_are_another_base() -> None:
    tensor = torch.randn(64, 48)
    assert checksum(tensor.flip(0)) != checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor)
    swapped = tensor.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksum(swapped) != checksum(tensor)
    # Words of a few bytes may change places too.
    assert checksum(torch.cat([tensor[4:], tensor[:4]])) != checksum(tensor)


def test_signs_of_whole_rows_count() -> None:
    tensor = torch.randn(64, 48)
    for rows in (slice(0, 1), slice(0, 2), slice(None)):
        negated = tensor.clone()
        negated[rows] *= -1
        assert checksum(negated) != checksum(tensor)
    for offset in range(8):
        negated = tensor.clone().view(-1)
        negated[offset::8] *= -1
        assert checksum(negated.view(64, 48)) != checksum(tensor)


def test_the_same_checkpoint_in_other_dtypes_is_the_same_base() -> None:
    published = torch.randn(64, 48).to(torch.bfloat16)
    assert checksum(published.float()) == checksum(published) == checksum(published.double())
    half = torch.randn(64, 48).to(torch.bfloat16).to(torch.float16)
    assert checksum(half.float()) == checksum(half)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, swapped = torch.randn(40), None
    whole = checksum(tensor)
    monkeypatch.setattr(module, "_CHUNK", 16)
    assert checksum(tensor) != 0
    swapped = torch.cat([tensor[16:32], tensor[:16], tensor[32:]])
    assert checksum(swapped) != checksum(tensor)
    monkeypatch.setattr(module, "_CHUNK", 1 << 22)
    assert checksum(tensor) == whole


def test_sums_are_those_that_earlier_checkpoints_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.arange(300001, dtype=torch.int32)
    values = torch.arange(300001) % 251 - 125.0
    for at_once in (1 << 10, 1 << 16, 1 << 20):
        monkeypatch.setattr(module, "_CACHED", at_once)
        assert checksum(words) == 3417738129841430080
        assert checksum(values) == 4673113130888597236
        # Not at the start of a word of the storage.
        assert checksum(torch.cat([values[:1], values]).bfloat16()[1:]) == checksum(values)


def test_kinds_of_tensors() -> None:
    for tensor in (
        torch.arange(10),
        torch.tensor(3.0),
        torch.empty(0),
        torch.tensor([True, False]),
        torch.randn(6, dtype=torch.complex64),
        torch.randn(8, 8)[:, ::2],
    ):
        assert 0 <= checksum(tensor) < 2**63
        assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(torch.arange(10)) != checksum(torch.arange(10).flip(0))


def test_meta_tensors_have_a_checksum_of_their_own() -> None:
    assert checksum(torch.empty(3, device="meta")) == NO_VALUES == -1


def test_constants_of_quantized_weights_count_bit_by_bit() -> None:
    layer = torch.nn.Linear(96, 64)
    quantize(layer, engine.quantization_config())
    stored = layer._parameters["weight"]
    before = checksum(stored)
    state = stored.quant_state
    for constant in (state.absmax, state.state2.absmax):
        kept = constant.clone()
        constant.view(-1)[0] += 1 if constant.dtype == torch.uint8 else 1e-6
        assert checksum(stored) != before
        constant.copy_(kept)
        assert checksum(stored) == before


def test_digest_depends_on_names_shapes_and_values() -> None:
    a, b = torch.randn(4, 6), torch.randn(6)
    first = fingerprint([("a", a), ("b", b)])
    assert first.digest() == fingerprint([("a", a.clone()), ("b", b)]).digest()
    others = [
        [("a", a), ("c", b)],
        [("a", a.view(6, 4)), ("b", b)],
        [("a", a + 1), ("b", b)],
        [("a", a)],
    ]
    assert all(fingerprint(items).digest() != first.digest() for items in others)


def test_differences_name_the_tensors() -> None:
    a, b = torch.randn(4), torch.randn(4)
    mine = fingerprint([("a", a), ("b", b)])
    assert mine.differences(mine.sums) == []
    assert mine.differences(fingerprint([("a", a), ("b", b + 1)]).sums) == ["b"]
    with pytest.raises(ValueError, match="argument"):
        mine.differences(mine.sums[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_an_exact_checksum_sees_every_bit(dtype: torch.dtype) -> None:
    values = torch.ones(3, 5).to(dtype)
    other = values.clone()
    assert exact_checksum(values) == exact_checksum(other)
    other.view(torch.uint8).view(-1)[-1] ^= 1
    assert exact_checksum(values) != exact_checksum(other)
    assert exact_checksum(values[0, 0]) == exact_checksum(values[1, 1])
    assert exact_checksum(torch.empty(2, device="meta")) == NO_VALUES

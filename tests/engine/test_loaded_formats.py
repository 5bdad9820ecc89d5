"""Weights as other libraries pack them, read against codes written by hand."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from models import llama_config
from torch import nn
from transformers import TorchAoConfig

from lightning_peft.engine.backends.aqlm import AQLM
from lightning_peft.engine.backends.compressed import COMPRESSED_TENSORS
from lightning_peft.engine.backends.gptq import AUTO_ROUND, AWQ, GPTQ
from lightning_peft.engine.backends.hqq import HQQ
from lightning_peft.engine.backends.loaded import (
    LoadedFormat,
    rounded_input,
    scaled,
    unpacked,
)
from lightning_peft.engine.backends.quanto import QUANTO
from lightning_peft.engine.backends.registry import (
    backend_of,
    parameter_count,
    quantization_config,
    storage_bytes,
)
from lightning_peft.engine.backends.torchao import TORCHAO
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plan.prediction import plan_memory


def stored_as(
    backend: LoadedFormat,
    codes: torch.Tensor,
    shape: tuple[int, int],
    settings: dict[str, Any],
    **tensors: torch.Tensor,
) -> Any:
    described = torch.tensor(list(json.dumps([shape, settings]).encode()), dtype=torch.uint8)
    dtype = torch.empty(0, dtype=torch.bfloat16)
    state = {"codes": codes, "dtype": dtype, "description": described, **tensors}
    return backend.from_state_tensors(state, torch.device("cpu"))


def words_of(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs rows of unsigned numbers into int32 words, by Python's integers."""
    rows = []
    for row in values.tolist():
        whole = sum(value << bits * place for place, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append(list(whole.to_bytes(4 * count, "little")))
    return torch.tensor(rows, dtype=torch.uint8).view(torch.int32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_width_are_unpacked(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (3, 37))
    octets = words_of(values, bits).view(torch.uint8)
    assert unpacked(octets, bits, 37).long().equal(values)


def test_blocks_that_do_not_divide_a_weight_are_cut_off() -> None:
    codes = torch.randint(-8, 8, (5, 7))
    scales, zeros = torch.rand(2, 3), torch.randint(-2, 3, (2, 3))
    rows, columns = torch.arange(5) // 3, torch.arange(7) // 3
    expected = (codes - zeros[rows][:, columns]) * scales[rows][:, columns]
    assert scaled(codes, scales, zeros, (3, 3)).equal(expected)


def _torchao_int4() -> tuple[Any, torch.Tensor]:
    codes, scale, zero = torch.randint(-8, 8, (4, 8)), torch.rand(2, 4), torch.randn(2, 4)
    packed = (codes[:, 1::2] << 4 | codes[:, ::2] & 15).to(torch.int8)
    meant = codes * scale.t().repeat_interleave(4, 1) + zero.t().repeat_interleave(4, 1)
    settings = {"layout": "Int4Tensor", "values": "int8"}
    return stored_as(TORCHAO, packed, (4, 8), settings, scale=scale, zero_point=zero), meant


def _torchao_float8() -> tuple[Any, torch.Tensor]:
    codes, scale = torch.randn(4, 8).to(torch.float8_e4m3fn), torch.rand(4, 1)
    settings = {"layout": "Float8Tensor", "values": "float8_e4m3fn"}
    stored = stored_as(TORCHAO, codes.view(torch.uint8), (4, 8), settings, scale=scale)
    return stored, codes.float() * scale


def _quanto_int4() -> tuple[Any, torch.Tensor]:
    groups, scale, shift = torch.randint(0, 16, (8, 4)), torch.rand(8, 1), torch.randn(8, 1)
    packed = (groups[:4] | groups[4:] << 4).to(torch.uint8)
    settings = {"values": "uint8", "bits": 4, "groups": 2}
    stored = stored_as(QUANTO, packed, (4, 8), settings, scale=scale, shift=shift)
    return stored, (groups * scale - shift).view(4, 8)


def _compressed_int4() -> tuple[Any, torch.Tensor]:
    codes, zeros = torch.randint(-8, 8, (8, 16)), torch.randint(-8, 8, (8, 2))
    scale, order = torch.rand(8, 2), torch.randperm(16) % 2
    meant = (codes - zeros[:, order]) * scale[:, order]
    tensors = {"zero_point": words_of((zeros + 8).t(), 4).t().contiguous(), "order": order}
    settings = {"values": "int32", "bits": 4, "block": None}
    packed = words_of(codes + 8, 4)
    return stored_as(COMPRESSED_TENSORS, packed, (8, 16), settings, scale=scale, **tensors), meant


def _hqq_int3() -> tuple[Any, torch.Tensor]:
    # Twelve groups of four; ten rows of two words, the first in the highest bits.
    groups, scale, zero = torch.randint(0, 8, (12, 4)), torch.rand(12, 1), torch.rand(12, 1)
    padded = torch.cat([groups, torch.zeros(8, 4).long()]).view(10, 2, 4)
    packed = sum(row << 27 - 3 * place for place, row in enumerate(padded)).int()
    settings = {"packing": "3bit_32", "axis": 1, "group_size": 4}
    stored = stored_as(HQQ, packed, (6, 8), settings, scale=scale, zero=zero)
    return stored, ((groups - zero) * scale).view(6, 8)


def _words_of_gptq(backend: LoadedFormat, bits: int, added: int) -> tuple[Any, torch.Tensor]:
    codes = torch.randint(0, 1 << bits, (32, 64))
    zeros, scale = torch.randint(1, 1 << bits, (32, 2)), torch.rand(32, 2)
    order = torch.randperm(64) % 2 if backend is GPTQ else torch.arange(64) // 32
    tensors = {"qzeros": words_of((zeros - added).t(), bits), "scales": scale.t().contiguous()}
    if backend is GPTQ:
        tensors["g_idx"] = order.int()
    settings = {"bits": bits, "group_size": 32, "added": added}
    packed = words_of(codes, bits).t().contiguous()
    meant = (codes - zeros[:, order]) * scale[:, order]
    return stored_as(backend, packed, (32, 64), settings, **tensors), meant


def _gptq_int4() -> tuple[Any, torch.Tensor]:
    return _words_of_gptq(GPTQ, 4, 0)


def _auto_round_int3() -> tuple[Any, torch.Tensor]:
    return _words_of_gptq(AUTO_ROUND, 3, 1)


def _awq_int4() -> tuple[Any, torch.Tensor]:
    codes, zeros = torch.randint(0, 16, (16, 64)), torch.randint(0, 16, (16, 2))
    scale, order = torch.rand(16, 2), [0, 2, 4, 6, 1, 3, 5, 7]
    packed, packed_zeros = (
        words_of(one.t().unflatten(1, (2, 8))[:, :, order].flatten(1), 4) for one in (codes, zeros)
    )
    groups = torch.arange(64) // 32
    tensors = {"qzeros": packed_zeros, "scales": scale.t().contiguous()}
    settings = {"bits": 4, "group_size": 32, "added": 0}
    meant = (codes - zeros[:, groups]) * scale[:, groups]
    return stored_as(AWQ, packed, (16, 64), settings, **tensors), meant


def _aqlm_int8() -> tuple[Any, torch.Tensor]:
    books, scale = torch.randn(2, 256, 1, 4), torch.rand(3, 1, 1, 1)
    codes = torch.randint(0, 256, (3, 5, 2))
    sums = [books[0, codes[:, k, 0], 0] + books[1, codes[:, k, 1], 0] for k in range(5)]
    meant = torch.cat(sums, 1)
    packed = codes.to(torch.uint8).view(torch.int8)
    stored = stored_as(AQLM, packed, (3, 20), {}, codebooks=books, scales=scale)
    return stored, meant * scale.view(3, 1)


MADE = [
    _torchao_int4,
    _torchao_float8,
    _quanto_int4,
    _compressed_int4,
    _hqq_int3,
    _gptq_int4,
    _auto_round_int3,
    _awq_int4,
    _aqlm_int8,
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_codes_mean_what_the_format_says(made: Any) -> None:
    torch.manual_seed(0)
    stored, meant = made()
    backend = backend_of(stored)
    assert backend is not None
    assert backend.dequantize(stored, torch.float32).allclose(meant.float(), atol=1e-6)
    assert backend.dequantize(stored).dtype == torch.bfloat16
    assert parameter_count(stored) == meant.numel()
    held = [stored, *stored.tensors.values()]
    assert storage_bytes(stored) == sum(one.numel() * one.element_size() for one in held)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_copies_keep_what_belongs_to_the_codes(made: Any) -> None:
    torch.manual_seed(0)
    stored, meant = made()
    backend = backend_of(stored)
    assert backend is not None
    rebuilt = backend.from_state_tensors(backend.state_tensors(stored), torch.device("cpu"))
    pickled = copy.deepcopy(pickle.loads(pickle.dumps(stored)))
    mapped = backend.map_tensors(stored, torch.clone)
    for copied in (copy.deepcopy(stored), rebuilt, pickled, mapped):
        assert copied is not stored
        assert backend.dequantize(copied, torch.float32).allclose(meant.float(), atol=1e-6)
        for name, tensor in stored.tensors.items():
            assert copied.tensors[name].equal(tensor)


def test_a_cast_of_the_module_leaves_float8_codes() -> None:
    stored, meant = _torchao_float8()
    layer = nn.Linear(8, 4)
    layer.weight = stored
    layer.to(torch.float16)
    assert TORCHAO.dequantize(layer.weight, torch.float32).equal(meant)


def test_inputs_are_rounded_and_their_gradient_is_not() -> None:
    x = torch.tensor([[-1.0, 0.3, 3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    found = rounded_input(x, {"values": "int8", "symmetric": False, "by_row": True})
    # 256 values from -1 to 3, of which one is zero.
    step = 4 / 255
    expected = [[-64 * step, 19 * step, 191 * step], [0.0, 0.0, 0.0]]
    assert found.allclose(torch.tensor(expected), atol=1e-6)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.equal(torch.ones(2, 3))
    kind = {"values": "float8_e4m3fn", "symmetric": True, "by_row": False}
    fixed = {"input_scale": torch.tensor([0.5])}
    assert rounded_input(torch.tensor([[0.53, 300.0]]), kind, fixed).tolist() == [[0.5, 224.0]]


@pytest.mark.skipif(find_spec("compressed_tensors") is not None, reason="it is installed")
def test_a_plan_by_name_takes_the_library() -> None:
    config = llama_config(quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(ConfigError, match="stored in the format compressed-tensors, whose library"):
        plan_memory(config, method="lora")


def test_these_formats_are_not_made_here() -> None:
    for given in (TorchAoConfig.__new__(TorchAoConfig), {"quant_method": "torchao"}):
        with pytest.raises(UnsupportedError, match="torchao weights are trained on as from_pre"):
            quantization_config(given)

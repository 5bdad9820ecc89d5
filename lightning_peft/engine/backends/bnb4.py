"""bitsandbytes' 4-bit types NF4 and FP4, after Dettmers et al. 2023 (arXiv 2305.14314)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from lightning_peft.compat.bitsandbytes import (
    LINEAR4BIT_ATTRIBUTES,
    chosen_compute_dtype,
    fill_linear4bit,
    is_repacked_for_cpu,
    prequantized,
    unpack_tensor_to_dict,
)
from lightning_peft.engine.backends import bnb_config, nf4_cpu
from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.bnb_config import BitsAndBytesBackend
from lightning_peft.engine.backends.layers import (
    QuantizedAttention,
    QuantizedConvolution,
    QuantizedExperts,
    QuantizedLinear,
)
from lightning_peft.engine.layers.expert_weights import ExpertWeight
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE
from lightning_peft.engine.layers.mixin import add_mixin

_PARAMETER_FIELDS = (
    "quant_state",
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_storage",
)


class FourBitLayer(QuantizedLinear):
    """A linear layer whose weight is a ``bitsandbytes.nn.Params4bit``.

    The forward pass never takes bitsandbytes' CPU repacking path: that path replaces the weight
    in place during the first evaluation and has no backward pass, so gradients through the layer
    would vanish from then on without an error.
    """

    label = "FourBit"


class FourBitConvolution(QuantizedConvolution):
    """A convolution whose kernel is a ``Params4bit``; bitsandbytes has none of its own."""

    label = "FourBit"


class FourBitAttention(QuantizedAttention):
    """An ``nn.MultiheadAttention`` whose ``in_proj_weight`` is a ``Params4bit``."""

    label = "FourBit"


class FourBitExperts(QuantizedExperts):
    """Weights of experts as a ``Params4bit``; bitsandbytes has none of its own."""

    label = "FourBit"


class FourBit(BitsAndBytesBackend):
    """NF4 and FP4, with or without double quantization."""

    layer_class = FourBitLayer
    convolution_class = FourBitConvolution
    attention_class = FourBitAttention
    expert_class = FourBitExperts
    module_classes = (bnb.nn.Linear4bit,)
    layer_attributes = LINEAR4BIT_ATTRIBUTES
    bits = 4
    can_be_packed = True
    vllm_quantization = bnb_config.NAME

    def accepts(self, config: BitsAndBytesConfig) -> bool:
        return bool(config.load_in_4bit)

    def config_to_dict(self, config: BitsAndBytesConfig) -> dict[str, Any]:
        return bnb_config.to_dict(
            config,
            "load_in_4bit",
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype",
        )

    def codes_settings(self, config: BitsAndBytesConfig) -> dict[str, Any]:
        fields = self.config_to_dict(config)
        # That is for the product, not for the codes.
        del fields["bnb_4bit_compute_dtype"]
        return fields

    def label(self, fields: Mapping[str, Any]) -> str:
        double = ", double quantization" if fields.get("bnb_4bit_use_double_quant") else ""
        return f"{fields.get('bnb_4bit_quant_type')}{double}"

    def compute_dtype(self, config: BitsAndBytesConfig) -> torch.dtype | None:
        dtype: torch.dtype | None = config.bnb_4bit_compute_dtype
        return dtype

    def base_class(self, layer: nn.Module) -> type[nn.Module] | None:
        others = (*CONVOLUTION_LIKE, Conv1D, ExpertWeight, nn.MultiheadAttention)
        return None if isinstance(layer, others) else bnb.nn.Linear4bit

    def prepare(self, layer: Any, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
        super().prepare(layer, config, dtype)
        if isinstance(layer, bnb.nn.Linear4bit):
            fill_linear4bit(layer)

    def adopt(self, layer: Any) -> None:
        bnb_config.require_codes(layer, layer.weight.quant_state is not None)
        # Reading the state dict undoes bitsandbytes' CPU repacking, if it already happened, up to
        # the rounding of the constants. Those of single quantization it leaves transposed, so that
        # each block of weights would be scaled by the constant of another one.
        layer.state_dict()
        state = layer.weight.quant_state
        if state.absmax.ndim == 2:
            state.absmax = state.absmax.t().reshape(-1).float()
        compute_dtype = chosen_compute_dtype(layer)
        add_mixin(layer, FourBitLayer)
        fill_linear4bit(layer)
        layer.compute_dtype = compute_dtype

    def storage_problem(self, stored: Any) -> str | None:
        if is_repacked_for_cpu(stored):
            return (
                "bitsandbytes repacked the weight in an evaluation, and passes no gradients "
                "through it any more"
            )
        return None

    def quantize(self, rows: Tensor, config: BitsAndBytesConfig, device: torch.device) -> Any:
        double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
        rows = rows.contiguous()
        fields: dict[str, Any] = {"compress_statistics": double, "quant_type": kind}
        if device.type != "cpu":
            dense: Any = bnb.nn.Params4bit(rows, requires_grad=False, **fields)
            return dense.to(device)
        codes, state = nf4_cpu.quantize_rows(rows.to(device), kind, double)
        return prequantized(codes, quant_state=state, **fields)

    def requantize(self, stored: Any, rows: Tensor) -> Tensor:
        state = stored.quant_state
        packed, new_state = quantize_4bit(
            rows.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
        )
        return _dequantized(packed, new_state)

    def nearest(self, stored: Any, rows: Tensor) -> Tensor:
        state = stored.quant_state
        constants = _constants(state, slice(0, None))
        scales = constants.where(constants != 0, 1).unsqueeze(1)
        numbers = F.pad(rows.float().reshape(-1), (0, -rows.numel() % state.blocksize))
        levels, order = state.code.sort()
        places = torch.bucketize(
            numbers.view(-1, state.blocksize) / scales, (levels[1:] + levels[:-1]) / 2
        )
        first, second = order.to(torch.uint8)[places].view(-1, 2)[: (rows.numel() + 1) // 2].t()
        return (first << 4 | second).view(stored.dtype).view(stored.shape)

    def dequantize(self, stored: Any, dtype: torch.dtype | None = None) -> Tensor:
        state = stored.quant_state
        if dtype is not None:
            # The codes become numbers of the dtype that is needed at once: bitsandbytes would make
            # those of the weight before quantization, and they would be copied.
            state = copy.copy(state)
            state.dtype = dtype
        return _dequantized(stored.data, state)

    def dequantize_rows(
        self, stored: Any, start: int, end: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        state, size = stored.quant_state, stored.quant_state.blocksize
        width = state.shape[1]
        blocks = slice(start * width // size, -(-end * width // size))
        first = blocks.start * size
        count = min(blocks.stop * size, state.shape.numel()) - first
        part = QuantState(
            absmax=_constants(state, blocks),
            shape=_as_blocks(count, size),
            dtype=dtype or state.dtype,
            blocksize=size,
            code=state.code,
            quant_type=state.quant_type,
        )
        numbers = dequantize_4bit(stored.data[first // 2 : (first + count + 1) // 2], part)
        rows = numbers.reshape(-1)[start * width - first :]
        return rows[: (end - start) * width].view(end - start, width)

    def matmul(self, layer: Any, input: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        state = stored.quant_state
        if _is_misread(stored, state):
            return super().matmul(layer, input, stored, bias)
        product: Tensor = bnb.matmul_4bit(input, stored, bias=bias, quant_state=state)
        return product

    def multiplies_dequantized(self, device: torch.device) -> bool:
        # On GPUs it has kernels that read the codes: for a few rows they read a quarter of the
        # bytes of a dense weight.
        return device.type == "cpu"

    def owns(self, stored: Any) -> bool:
        return getattr(stored, "quant_state", None) is not None

    def weight_info(self, stored: Any) -> tuple[torch.Size, torch.dtype]:
        return torch.Size(stored.quant_state.shape), stored.quant_state.dtype

    def constants(self, stored: Any) -> list[Tensor]:
        state = stored.quant_state
        return [state.absmax, *([state.state2.absmax] if state.nested else [])]

    def tables(self, stored: Any) -> list[Tensor]:
        state = stored.quant_state
        return [state.code, *([state.state2.code, state.offset] if state.nested else [])]

    def state_tensors(self, stored: Any) -> dict[str, Tensor]:
        return {"codes": stored.data, **stored.quant_state.as_dict(packed=True)}

    def from_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        rest = {f"weight.{key}": tensor for key, tensor in tensors.items() if key != "codes"}
        stored = bnb.nn.Params4bit.from_prequantized(tensors["codes"], rest, device=device)
        if stored.quant_state.nested:
            # bitsandbytes makes it in the default dtype, which Lightning changes for
            # configure_model.
            packed = next(key for key in tensors if key.startswith("quant_state."))
            offset = unpack_tensor_to_dict(tensors[packed])["nested_offset"]
            stored.quant_state.offset = torch.tensor(offset, dtype=torch.float32, device=device)
        return stored

    def restore(self, stored: Any, device: torch.device) -> Any:
        if not isinstance(stored, bnb.nn.Params4bit):
            fields = {name: getattr(stored, name) for name in _PARAMETER_FIELDS}
            stored = prequantized(stored.data, **fields)
        # `to` makes another parameter, and others may hold this one.
        return stored if stored.device == device else stored.to(device)

    def meta(self, rows: Tensor, config: BitsAndBytesConfig) -> Any:
        blocks = -(-rows.numel() // nf4_cpu.BLOCK)
        nested = None
        if config.bnb_4bit_use_double_quant:
            outer = rows.new_empty(-(-blocks // nf4_cpu.NESTED_BLOCK), dtype=torch.float32)
            nested = QuantState(
                absmax=outer,
                blocksize=nf4_cpu.NESTED_BLOCK,
                code=outer.new_empty(256),
                dtype=torch.float32,
            )
        codes = rows.new_empty((rows.numel() + 1) // 2, 1, dtype=torch.uint8)
        stored: Any = nn.Parameter(codes, requires_grad=False)
        stored.quant_state = QuantState(
            absmax=rows.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32),
            shape=rows.shape,
            dtype=rows.dtype,
            blocksize=nf4_cpu.BLOCK,
            code=rows.new_empty(16, dtype=torch.float32),
            quant_type=config.bnb_4bit_quant_type,
            offset=rows.new_empty((), dtype=torch.float32) if nested else None,
            state2=nested,
        )
        return stored

    def map_tensors(self, stored: Any, function: Callable[[Tensor], Tensor]) -> Any:
        copied: Any = nn.Parameter(function(stored), requires_grad=False)
        for name in _PARAMETER_FIELDS:
            setattr(copied, name, getattr(stored, name, None))
        copied.quant_state = _map_state(stored.quant_state, function)
        return copied

    def stored_bytes(self, parameters: int, config: BitsAndBytesConfig) -> int:
        # Half a byte each and a float32 constant for each block, or an 8-bit one and a float32 for
        # each block of those: 4.5 or 4.127 bits each (arXiv 2305.14314, section 3).
        blocks = -(-parameters // nf4_cpu.BLOCK)
        nested = blocks + 4 * -(-blocks // nf4_cpu.NESTED_BLOCK)
        constants = nested if config.bnb_4bit_use_double_quant else 4 * blocks
        return -(-parameters // 2) + constants

    def workspace_bytes(
        self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int | None:
        # The dequantized weight, and its constants in float32. The arguments are those of
        # `bitsandbytes::gemm_4bit`: input, codes, shape, constants, block, and by keyword those of
        # double quantization.
        if operation.namespace != "bitsandbytes" or "gemm_4bit" not in operation.name():
            return None
        parameters, block = torch.Size(args[2]).numel(), args[4]
        constants = 2 * 4 * -(-parameters // block) if kwargs else 0
        size: int = parameters * args[0].element_size() + constants
        return size

    def is_dequantization(self, operation: Any) -> bool:
        return operation.namespace == "bitsandbytes" and "dequantize" in operation.name()


def _is_misread(codes: Tensor, state: Any) -> bool:
    """Whether bitsandbytes would scale weights by the constants of other blocks.

    Its kernel for CPUs with AVX-512 (0.50.0, 0.50.2) starts each row at constant number
    ``row * (width // blocksize)``, which is right only where rows end with blocks. Its pull request
    1828 keeps blocks of 2,048 and more away from that kernel; no issue names the reason. On GPUs
    blocks are counted over the whole weight, and nothing changes.
    """
    return codes.device.type == "cpu" and state.shape[-1] % state.blocksize != 0


def _as_blocks(count: int, size: int) -> torch.Size:
    """A shape of ``count`` weights in which no row ends within a block, but the last."""
    return torch.Size((1, count) if count % size else (count // size, size))


def _dequantized(codes: Tensor, state: Any) -> Tensor:
    """What ``codes`` stand for, in the shape and dtype of ``state``."""
    shape = state.shape
    if _is_misread(codes, state):
        state = copy.copy(state)
        state.shape = _as_blocks(shape.numel(), state.blocksize)
    numbers: Tensor = dequantize_4bit(codes, state)
    return numbers.reshape(shape)


def _constants(state: Any, blocks: slice) -> Tensor:
    """The constants of some blocks in float32, as bitsandbytes dequantizes those of all."""
    constants: Tensor = state.absmax[blocks]
    if not state.nested:
        return constants
    outer = state.state2
    places = torch.arange(len(constants), device=constants.device).add_(blocks.start)
    places //= outer.blocksize
    numbers: Tensor = outer.code[constants.long()] * outer.absmax[places] + state.offset
    return numbers


def _map_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return QuantState(
        absmax=function(state.absmax),
        shape=state.shape,
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=function(state.code),
        quant_type=state.quant_type,
        offset=function(state.offset) if state.nested else None,
        state2=_map_state(state.state2, function) if state.nested else None,
    )


FOUR_BIT: QuantizationBackend[BitsAndBytesConfig] = FourBit()

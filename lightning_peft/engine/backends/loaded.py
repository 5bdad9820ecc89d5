"""Weights that another library quantized and transformers loaded: read here, not made here.

Each library keeps codes, scales and zeros in its own way. Here they become one frozen parameter of
integers with the rest as attributes, in a plain ``nn.Linear``: it stays packed, and is dequantized
by torch alone for the product and again for its gradient. The library's kernels, which exist for
some devices only and mostly have no backward pass, are not called.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.layers import QuantizedLinear
from lightning_peft.engine.layers.mixin import add_mixin
from lightning_peft.errors import UnsupportedError


@dataclass
class LoadedWeight:
    """What a library keeps of one weight.

    Attributes:
        codes: Its values, mostly packed; in ``torch.uint8`` where they are float8, since a cast of
            the module would change other floats.
        shape: ``(out, in)`` of the weight.
        dtype: That of the weight before, in which it is given to others.
        tensors: Scales, zeros and other tensors, by name.
        settings: Numbers and words that say how to read them, for JSON.
    """

    codes: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class LoadedParameter(nn.Parameter):
    """Codes with what belongs to them; copies and pickles keep it.

    Attributes:
        format_name: ``name`` of its backend.
        dense_shape: ``(out, in)``.
        dense_dtype: Dtype before quantization.
        tensors: As in :class:`LoadedWeight`.
        settings: As in :class:`LoadedWeight`.
    """

    format_name: str
    dense_shape: torch.Size
    dense_dtype: torch.dtype
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedParameter:
        if id(self) not in memo:
            kept = copy.deepcopy(vars(self), memo)
            memo[id(self)] = _parameter(self.data.clone(), kept)
        found: LoadedParameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # That of the base class makes a plain parameter, whose copies lose the attributes.
        return _parameter, (self.data, vars(self))


def _parameter(codes: Tensor, attributes: Mapping[str, Any]) -> LoadedParameter:
    made = LoadedParameter(codes, requires_grad=False)
    vars(made).update(attributes)
    return made


class LoadedLinear(QuantizedLinear):
    """A linear layer with such a weight; it may round its input, as the library's layer does."""

    def product(self, rows: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        """As of the base class, of the rounded input; its gradient goes past the rounding."""
        return super().product(self._rounded(rows, stored), stored, bias)

    def dense_output(self, input: Tensor) -> Tensor:
        """As of the base class, of the rounded input."""
        return super().dense_output(self._rounded(input, self.stored_weight()))

    def _rounded(self, rows: Tensor, stored: Any) -> Tensor:
        kind = stored.settings.get("input")
        return rows if kind is None else rounded_input(rows, kind, stored.tensors)


class LoadedFormat(QuantizationBackend[Any]):
    """A format that transformers loads.

    Attributes:
        library_attributes: What the library sets on a layer, which its replacement is without.
    """

    library_attributes: ClassVar[tuple[str, ...]] = ()

    # What a format says.

    @abstractmethod
    def claims(self, layer: nn.Module) -> bool:
        """Whether the weight of ``layer`` is in this format; without an import of the library."""

    @abstractmethod
    def read(self, layer: Any) -> LoadedWeight:
        """The weight of a layer that the library made; changes nothing and copies no codes.

        Raises:
            UnsupportedError: If it is in a layout that :meth:`unpack` cannot read.
        """

    @abstractmethod
    def unpack(
        self, codes: Tensor, tensors: Mapping[str, Tensor], stored: LoadedParameter
    ) -> Tensor:
        """The weight ``(out, in)`` in float32, from codes and tensors on one device."""

    def lay_out(self, model: Any, settings: Any) -> None:
        """Gives a model without values the layers that reading quantized files would give it.

        Args:
            model: A transformers model on the meta device.
            settings: ``quantization_config`` of its config.

        Raises:
            ImportError: If the library is not installed.
        """
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment()
        quantizer.preprocess_model(model)

    def forget(self, module: nn.Module) -> None:
        """Takes off what the library put on ``module`` for its layers, which are replaced."""

    # What follows.

    def reading_problem(self, layer: nn.Module) -> str | None:
        """Why :meth:`replacement` refuses ``layer``; ``None`` where it does not."""
        try:
            self.read(layer)
        except UnsupportedError as error:
            return str(error)
        return None

    def replacement(self, layer: Any) -> nn.Module:
        """The layer of this package for one that the library made; both hold the same codes."""
        read = self.read(layer)
        made: Any = nn.Linear(1, 1, device="meta")
        left = {"_parameters", "_buffers", "forward", *self.library_attributes}
        # Of a class of the library's own, the rest is for its forward pass.
        kept = set(vars(layer) if isinstance(layer, nn.Linear) else vars(made))
        own = {name: one for name, one in vars(layer).items() if name in kept - left}
        vars(made).update(own)
        stored = _parameter(
            read.codes.detach(),
            {
                "format_name": self.name,
                "dense_shape": torch.Size(read.shape),
                "dense_dtype": read.dtype,
                "tensors": {name: tensor.detach() for name, tensor in read.tensors.items()},
                "settings": read.settings,
            },
        )
        bias = layer.bias
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        made._parameters = {"weight": stored, "bias": bias}
        made.out_features, made.in_features = read.shape
        add_mixin(made, self.layer_class)
        made.compute_dtype = None
        replacement: nn.Module = made
        return replacement

    def check_config(self, config: Any) -> None:
        shown = config if isinstance(config, Mapping) else type(config).__name__
        raise UnsupportedError(
            f"quantization_config={shown}: {self.name} weights are trained on as from_pretrained "
            "loads them, and not made here. Load the base with this config and leave "
            "`quantization_config` out, or quantize by a BitsAndBytesConfig."
        )

    def config_to_dict(self, config: Any) -> dict[str, Any]:
        self.check_config(config)
        return {}

    def config_from_dict(self, fields: Mapping[str, Any]) -> Any:
        self.check_config(dict(fields))
        return None

    def unsupported_reason(self, layer: nn.Module) -> str | None:
        return f"{self.name} weights are not made here"

    def quantize(self, rows: Tensor, config: Any, device: torch.device) -> Any:
        self.check_config(config)

    def meta(self, rows: Tensor, config: Any) -> Any:
        self.check_config(config)

    def stored_bytes(self, parameters: int, config: Any) -> int:
        return parameters * self.bits // 8

    def dequantize(self, stored: Any, dtype: torch.dtype | None = None) -> Tensor:
        device = stored.device
        if any(one.device != device for one in stored.tensors.values()):
            # The parameter moves with its module, its attributes follow here.
            stored.tensors = {name: one.to(device) for name, one in stored.tensors.items()}
        rows = self.unpack(stored.data, stored.tensors, stored)
        return rows.to(dtype or stored.dense_dtype)

    def rounds_input(self, stored: Any) -> bool:
        return stored.settings.get("input") is not None

    def owns(self, stored: Any) -> bool:
        return getattr(stored, "format_name", None) == self.name

    def weight_info(self, stored: Any) -> tuple[torch.Size, torch.dtype]:
        return stored.dense_shape, stored.dense_dtype

    def constants(self, stored: Any) -> list[Tensor]:
        return list(stored.tensors.values())

    def state_tensors(self, stored: Any) -> dict[str, Tensor]:
        described = json.dumps([list(stored.dense_shape), stored.settings])
        return {
            "codes": stored.data,
            **stored.tensors,
            # A tensor without elements has a dtype.
            "dtype": torch.empty(0, dtype=stored.dense_dtype),
            "description": torch.tensor(list(described.encode()), dtype=torch.uint8),
        }

    def from_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        shape, settings = json.loads(bytes(tensors["description"].tolist()))
        others = {name: one for name, one in tensors.items() if name not in _DESCRIPTION}
        return _parameter(
            tensors["codes"].to(device),
            {
                "format_name": self.name,
                "dense_shape": torch.Size(shape),
                "dense_dtype": tensors["dtype"].dtype,
                "tensors": {name: one.to(device) for name, one in others.items()},
                "settings": settings,
            },
        )

    def restore(self, stored: Any, device: torch.device) -> Any:
        if isinstance(stored, LoadedParameter) and stored.device == device:
            return stored
        return _parameter(stored.data.to(device), vars(stored))

    def map_tensors(self, stored: Any, function: Callable[[Tensor], Tensor]) -> Any:
        copied: Any = nn.Parameter(function(stored), requires_grad=False)
        vars(copied).update(vars(stored))
        copied.tensors = {name: function(one) for name, one in stored.tensors.items()}
        return copied


_DESCRIPTION = ("codes", "dtype", "description")


def unpacked(octets: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned numbers of ``bits`` bits, packed from the lowest bit of the first byte on.

    Args:
        octets: ``(rows, bytes)`` of ``torch.uint8``.
        bits: From 1 to 8.
        columns: How many numbers a row has.

    Returns:
        ``(rows, columns)`` of ``torch.uint8``, or ``torch.int32`` where numbers cross bytes.
    """
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)
        return (octets.unsqueeze(-1) >> shifts).bitwise_and_(mask).flatten(1)[:, :columns]
    starts = torch.arange(columns, device=octets.device) * bits
    words = F.pad(octets, (0, 1)).int()
    first = starts // 8
    pairs = words[:, first] | words[:, first + 1] << 8
    return (pairs >> starts % 8).bitwise_and_(mask)


def scaled(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    block: tuple[int, int] | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """``(codes - zeros) * scales + added`` in float32.

    Args:
        codes: ``(out, in)``.
        scales: One number, one per row, or a matrix with one per block.
        zeros: Like ``scales``.
        block: Sizes of a block; by default those that divide the weight evenly. The last blocks of
            rows and columns may be smaller.
        added: Like ``scales``.

    Returns:
        The weight ``(out, in)``.
    """
    scales = scales.float().reshape(scales.shape if scales.ndim == 2 else (-1, 1))
    rows, columns = scales.shape
    height, width = block or (codes.shape[0] // rows, codes.shape[1] // columns)
    ragged = (-codes.shape[0] % height, -codes.shape[1] % width)
    # In place from here on: weights are large.
    values = codes.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if any(ragged):
        values = F.pad(values, (0, ragged[1], 0, ragged[0]))
    blocks = values.reshape(rows, height, columns, width)
    if zeros is not None:
        blocks.sub_(zeros.float().reshape(rows, 1, columns, 1))
    blocks.mul_(scales.reshape(rows, 1, columns, 1))
    if added is not None:
        blocks.add_(added.float().reshape(rows, 1, columns, 1))
    return blocks.view(rows * height, columns * width)[: codes.shape[0], : codes.shape[1]]


def rounded_input(
    rows: Tensor, kind: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``rows`` in the values that a library multiplies, with the gradient of ``rows`` themselves.

    The straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432).

    Args:
        rows: ``(..., in)``.
        kind: ``"values"``, a dtype; ``"symmetric"``; ``"by_row"``: whether each row has a scale.
        tensors: Has ``"input_scale"``, and maybe ``"input_zero_point"``, where these are fixed.
    """
    values, dtype = rows.detach().float(), getattr(torch, kind["values"])
    fixed = {} if tensors is None else tensors
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    axes = (-1,) if kind["by_row"] else tuple(range(values.ndim))
    zero: Tensor | float = 0.0
    if "input_scale" in fixed:
        scale = fixed["input_scale"].to(values)
        zero = fixed["input_zero_point"].to(values) if "input_zero_point" in fixed else zero
    elif kind["symmetric"]:
        span = limits.max if dtype.is_floating_point else (limits.max - limits.min) / 2
        scale = values.abs().amax(axes, keepdim=True) / span
    else:
        low = values.amin(axes, keepdim=True).clamp(max=0)
        high = values.amax(axes, keepdim=True).clamp(min=0)
        scale = (high - low) / (limits.max - limits.min)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    if "input_scale" not in fixed and not kind["symmetric"]:
        zero = (limits.min - (low / scale).round()).clamp(limits.min, limits.max)
    codes = values / scale if dtype.is_floating_point else (values / scale).round() + zero
    codes = codes.clamp(limits.min, limits.max).to(dtype)
    return rows + ((codes.float() - zero) * scale - values).to(rows.dtype)

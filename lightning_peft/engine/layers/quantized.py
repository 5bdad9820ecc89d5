"""Layers whose frozen weight is stored in 4 or 8 bits, and what such a weight stands for.

The data types and kernels are bitsandbytes'. Dettmers et al. 2023 (arXiv 2305.14314) describe NF4
and double quantization, Dettmers et al. 2022 (arXiv 2208.07339) LLM.int8.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_peft.compat.torch import save_to_state_dict
from lightning_peft.engine.layers.convolution import convolution_geometry, frozen_convolution
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.mixin import LayerMixin
from lightning_peft.engine.layers.weight_view import replacement_error


def output_dtype(input: Tensor) -> torch.dtype:
    """Returns the dtype in which a linear layer answers ``input``: autocast's, or its own."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return input.dtype


class QuantizedLayer(LayerMixin):
    """Base of the layers here; other code that reads ``weight`` sees it dequantized."""

    bias: Tensor | None

    def register_parameter(self, name: str, param: Any) -> None:
        """Registers a parameter, unless it is a dense weight in place of the codes.

        Raises:
            UnsupportedError: If it is another weight.
        """
        stored = self._parameters.get("weight")
        if name == "weight" and stored is not None and param is not stored:
            raise replacement_error(name)
        super().register_parameter(name, param)

    def weight_is_stored(self) -> bool:
        """``False``: the stored parameter holds codes, not weights."""
        return False

    def probe(self) -> Tensor:
        """Returns a random input of the smallest kind that the layer takes, in its own dtype."""
        shape, dtype = self.weight_info()
        width = shape[0] if isinstance(self, Conv1D) else shape[1]
        return torch.randn(4, width, device=self._parameters["weight"].device, dtype=dtype)

    def dense_output(self, input: Tensor) -> Tensor:
        """Returns the product of ``input`` with the effective weight, in float32, by torch."""
        rows = as_rows(self, self.effective_weight())  # type: ignore[arg-type]
        return F.linear(input.float(), rows.float())


class FourBitLayer(QuantizedLayer):
    """A linear layer whose weight is a ``bitsandbytes.nn.Params4bit``.

    The forward pass never takes bitsandbytes' CPU repacking path: that path replaces the weight
    in place during the first evaluation and has no backward pass, so gradients through the layer
    would vanish from then on without an error.

    Attributes:
        compute_dtype: Dtype of the matrix product; ``None`` follows the input or autocast.
    """

    label = "FourBit"

    compute_dtype: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ dequantize(weight).T + bias`` with gradients to ``input``.

        Args:
            input: ``(..., in)`` of any floating dtype.

        Raises:
            RuntimeError: If the last size is another one than ``in``. bitsandbytes would take
                ``out`` for it too, and multiply by the transposed weight.
        """
        stored = self._parameters["weight"]
        out_features, in_features = stored.quant_state.shape
        if input.shape[-1] != in_features:
            raise RuntimeError(
                f"The input has shape {tuple(input.shape)} and the 4-bit layer maps "
                f"{in_features} to {out_features} features."
            )
        out_dtype = output_dtype(input)
        dtype = self.compute_dtype or out_dtype
        # A cast copy: bitsandbytes' own layer casts the stored bias, which changes the base.
        bias = None if self.bias is None else self.bias.to(dtype)
        product = bnb.matmul_4bit(
            input.to(dtype), stored, bias=bias, quant_state=stored.quant_state
        )
        return product.to(out_dtype)

    def weight_info(self) -> tuple[torch.Size, torch.dtype]:
        """Returns shape and dtype from before quantization."""
        state = self._parameters["weight"].quant_state
        shape = torch.Size(state.shape)
        return from_rows(self, torch.empty(shape, device="meta")).shape, state.dtype

    def effective_weight(self) -> Tensor:
        """Returns the dequantized weight, in the layout and dtype from before quantization."""
        stored = self._parameters["weight"]
        return from_rows(self, dequantize_4bit(stored.data, stored.quant_state))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Not bitsandbytes' own, which changes the stored weight when it is repacked.
        save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[arg-type]
        state = self._parameters["weight"].quant_state
        for key, value in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._parameters["weight"] = as_params4bit(self._parameters["weight"])


class FourBitConvolution(FourBitLayer):
    """A convolution, transposed or not, whose kernel is a ``bitsandbytes.nn.Params4bit``.

    bitsandbytes has no convolution of its own. The kernel is dequantized for the forward pass and
    again for the backward pass; in between only the codes exist.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Returns the convolution with the dequantized kernel, with gradients to ``input``.

        Args:
            input: ``(N, in, *size)`` or ``(in, *size)`` of any floating dtype.
            output_size: As transposed convolutions take it.
        """
        out_dtype = output_dtype(input)
        dtype = self.compute_dtype or out_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        product = frozen_convolution(
            self,
            input.to(dtype),
            # Past the adapters, which add their own.
            lambda: FourBitLayer.effective_weight(self).to(dtype),
            bias,
            output_size,
        )
        return product.to(out_dtype)

    def probe(self) -> Tensor:
        """Returns a random batch of two whose sizes are a little over the kernel's reach."""
        layer: Any = self
        spans = zip(layer.kernel_size, layer.dilation, strict=True)
        size = [kernel * dilation + 2 for kernel, dilation in spans]
        device = self._parameters["weight"].device
        return torch.randn(2, layer.in_channels, *size, device=device, dtype=self.weight_info()[1])

    def dense_output(self, input: Tensor) -> Tensor:
        """Returns the convolution with the effective weight, in float32, by torch."""
        batched, geometry = convolution_geometry(self, input.float())
        weight = self.effective_weight().float()
        product: Tensor = torch.ops.aten.convolution(batched, weight, None, *geometry)
        return product


def as_params4bit(stored: Any) -> Any:
    """Returns ``stored`` as what it was: pickle turns every parameter into ``nn.Parameter``."""
    if isinstance(stored, bnb.nn.Params4bit):
        return stored
    names = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage")
    return bnb.nn.Params4bit(
        stored.data,
        requires_grad=False,
        bnb_quantized=True,
        **{name: getattr(stored, name) for name in names},
    )


class EightBitLayer(QuantizedLayer):
    """A linear layer whose weight is int8 with one scale per row, as in LLM.int8.

    Attributes:
        state: bitsandbytes' ``MatmulLtState``, filled from the weight in every forward pass.
        dense_dtype: Dtype of the weight before quantization.
    """

    label = "EightBit"

    state: Any
    dense_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ dequantize(weight).T + bias`` with gradients to ``input``.

        Args:
            input: ``(..., in)`` of any floating dtype.
        """
        dtype = output_dtype(input)
        # The weight moves with the module; bitsandbytes' state and the scales do not.
        stored = self._parameters["weight"]
        stored.SCB = stored.SCB.to(stored.device)
        self.state.CB, self.state.SCB = stored.data, stored.SCB
        # On the CPU, bitsandbytes rounds activations to int8 in eval mode only: validation would
        # score another function than the one in training.
        self.state.is_training = self.training or input.device.type == "cpu"  # type: ignore[attr-defined]
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = bnb.matmul(input.to(dtype), stored, bias=bias, state=self.state)
        return product

    def weight_info(self) -> tuple[torch.Size, torch.dtype]:
        """Returns shape and dtype from before quantization."""
        return self._parameters["weight"].shape, self.dense_dtype

    def effective_weight(self) -> Tensor:
        """Returns the dequantized weight in the dtype from before quantization."""
        stored = self._parameters["weight"]
        scales = stored.SCB.to(stored.device).float() / 127.0
        return (stored.data.float() * scales.unsqueeze(1)).to(self.dense_dtype)


def is_quantized(layer: nn.Module) -> bool:
    """Says whether the weight of ``layer`` is stored by bitsandbytes in 4 or 8 bits."""
    return isinstance(layer, (QuantizedLayer, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def storage_bytes(param: Tensor) -> int:
    """Returns the bytes that a parameter occupies, with the constants of its quantization.

    The code tables of 4-bit types (16 and 256 numbers per layer) are left out, as is usual.
    """
    total = param.numel() * param.element_size()
    for constant in quantization_constants(param):
        total += constant.numel() * constant.element_size()
    return total


def quantization_constants(param: Tensor) -> list[Tensor]:
    """Returns the scales that a quantized parameter carries; an empty list for a dense one."""
    state = getattr(param, "quant_state", None)
    if state is not None:
        return [state.absmax, *([state.state2.absmax] if state.nested else [])]
    scales = getattr(param, "SCB", None)
    return [] if scales is None else [scales]


def element_count(param: Tensor) -> int:
    """Returns how many weights a parameter stands for (4-bit packs two in a byte)."""
    state = getattr(param, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else param.numel()

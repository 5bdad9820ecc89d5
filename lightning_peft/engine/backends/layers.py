"""Layers and expert weights with a quantized frozen weight, for any backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch import FakeTensor, is_functional, save_to_state_dict
from lightning_peft.engine.backends.base import QuantizationBackend
from lightning_peft.engine.backends.packed import PackedWeight, Share
from lightning_peft.engine.layers.convolution import convolution_geometry, frozen_convolution
from lightning_peft.engine.layers.expert_weights import ExpertMixin, parameter_name
from lightning_peft.engine.layers.kinds import as_rows, from_rows
from lightning_peft.engine.layers.mixin import AttentionWeight, ClassKey, LayerMixin
from lightning_peft.engine.layers.weight_view import replacement_error


def output_dtype(input: Tensor) -> torch.dtype:
    """Dtype in which a linear layer answers ``input``: autocast's, or its own."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return input.dtype


@dataclass
class QuantizedBackup:
    """A quantized weight that a dense one replaced, and what else belongs to it on the layer."""

    weight: nn.Parameter
    attributes: dict[str, Any]
    key: ClassKey


class QuantizedLayer(LayerMixin):
    """Base of the mixins here; other code that reads ``weight`` sees it dequantized.

    Attributes:
        backend: The handler of the stored weight.
        compute_dtype: Dtype of the product; ``None`` follows the input or autocast.
        packed: How to read the stored parameter, where it is one of bytes.
    """

    standard_forward = True
    backend: ClassVar[QuantizationBackend[Any]]

    bias: Tensor | None
    compute_dtype: torch.dtype | None
    packed: PackedWeight | None = None
    _buffers: dict[str, Any]

    def register_parameter(self, name: str, param: Any) -> None:
        """Registers a parameter, unless it is a dense weight in place of the codes."""
        stored = self._parameters.get(self.weight_name)
        if name == self.weight_name and stored is not None and param is not stored:
            raise replacement_error(name)
        super().register_parameter(name, param)

    def weight_is_stored(self) -> bool:
        """``False``: the stored parameter holds codes, not weights."""
        return False

    def pack_weight(self, device: torch.device, share: Share | None = None) -> None:
        """Stores codes and constants as the bytes of one parameter."""
        self.packed = PackedWeight(self.backend, self._parameters[self.weight_name], device)
        self._parameters[self.weight_name] = self.packed.release(share)

    def stored_weight(self) -> Any:
        """The quantized weight."""
        stored = self._parameters[self.weight_name]
        return stored if self.packed is None else self.packed.open(stored)

    def described_weight(self) -> Any:
        """The quantized weight, without values where it is packed: for its sizes."""
        return self._parameters[self.weight_name] if self.packed is None else self.packed.template

    def weight_info(self) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype from before quantization."""
        shape, dtype = self.backend.weight_info(self.described_weight())
        return from_rows(self, torch.empty(shape, device="meta")).shape, dtype

    def effective_weight(self) -> Tensor:
        """The dequantized weight, in the layout and dtype from before quantization."""
        return from_rows(self, self.backend.dequantize(self.stored_weight()))

    def store_weight(self, weight: Tensor) -> None:
        """Puts the nearest codes in place of those that are there; the constants stay."""
        rows = as_rows(self, weight)  # type: ignore[arg-type]
        stored = self._parameters[self.weight_name]
        # The same parameter, which optimizers hold; not in its memory, which others may share.
        stored.data = self.backend.nearest(stored, rows)

    def dense_output(self, input: Tensor) -> Tensor:
        """The product of ``input`` with the effective weight, in float32, by torch."""
        rows = as_rows(self, self.effective_weight())  # type: ignore[arg-type]
        return F.linear(input.float(), rows.float())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Not that of the library's class below, which may change the stored weight.
        save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[arg-type]
        for key, value in self.constants_in_state().items():
            destination[f"{prefix}{self.weight_name}.{key}"] = (
                value if keep_vars else value.detach()
            )

    def constants_in_state(self) -> dict[str, Tensor]:
        """What a state dict has of the weight besides the codes, by the last step of its keys."""
        if self.packed is not None:
            # The constants are among the bytes.
            return {}
        tensors = self.backend.state_tensors(self._parameters[self.weight_name])
        return {key: value for key, value in tensors.items() if key != "codes"}

    def load_weight(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes codes and constants out of what :meth:`state_dict` gave."""
        start = f"{prefix}{self.weight_name}"
        constants = {key: state[f"{start}.{key}"] for key in self.constants_in_state()}
        self._load_codes({"codes": state[start], **constants})

    def _load_codes(self, tensors: Mapping[str, Tensor]) -> None:
        stored = self._parameters[self.weight_name]
        made = self.backend.from_state_tensors(tensors, stored.device)
        stored.data = made.data
        vars(stored).update(vars(made))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *found: list[str]
    ) -> None:
        """Takes the state of a layer with the same frozen weight, as this one gave it."""
        missing, unexpected, errors = found
        mine: dict[str, Any] = {}
        self._save_to_state_dict(mine, "", False)
        constants = self.quantization_keys()
        # The codes of experts are in the state of the layer around.
        frozen = [key for key in (self.weight_name, *constants) if key in mine]
        keys = [f"{prefix}{key}" for key in constants if f"{prefix}{key}" in state_dict]
        pairs = [(state_dict.get(f"{prefix}{key}"), mine[key]) for key in frozen]
        same = (x is not None and torch.equal(x.to(y), y) for x, y in pairs)
        if keys and not all(same):
            errors.append(
                f"{prefix}{self.weight_name}: quantized values other than those of this module. "
                "The base is frozen: build the module with the one that the state is of."
            )
            return
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        unexpected[:] = [key for key in unexpected if key not in keys]

    def quantization_keys(self) -> list[str]:
        """The keys in a state dict, besides those of parameters, that the weight consists of."""
        state: dict[str, Any] = {}
        self._save_to_state_dict(state, "", True)
        return [key for key in state if key not in (*self._parameters, *self._buffers)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        stored = self._parameters[self.weight_name]
        if self.packed is None:
            self._parameters[self.weight_name] = self.backend.restore(stored, stored.device)


class QuantizedLinear(QuantizedLayer):
    """``nn.Linear`` or ``Conv1D`` with a quantized weight.

    Attributes:
        dense_copies: The dequantized weight by dtype, where it is kept; see
            :func:`~lightning_peft.engine.dense_copies`.
    """

    dense_copies: dict[torch.dtype, Tensor] | None = None

    def dense_copy(self, dtype: torch.dtype) -> Tensor | None:
        """The dequantized weight in ``dtype``, where copies are kept."""
        if self.dense_copies is None or self.packed is not None:
            return None
        if dtype not in self.dense_copies:
            # Training may come after: it saves no tensors of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                copy = self.backend.dequantize(self.stored_weight(), dtype)
            self.dense_copies[dtype] = copy
        return self.dense_copies[dtype]

    def product(self, rows: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        """``rows @ weight.T + bias``, with gradients to ``rows`` and ``bias``."""
        copy = self.dense_copy(rows.dtype)
        if copy is None and is_functional():
            # `torch.func` does not go through the autograd functions of products.
            copy = self.backend.weight_to_multiply(stored, rows.dtype)
        if copy is None:
            return self.backend.matmul(self, rows, stored, bias)
        return F.linear(rows, copy, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Returns ``input @ dequantize(weight).T + bias`` with gradients to ``input``.

        Args:
            input: ``(..., in)`` of any floating dtype.

        Raises:
            RuntimeError: If the last size is another one than ``in``. bitsandbytes would take
                ``out`` for it too, and multiply by the transposed weight.
        """
        stored = self.stored_weight()
        out_features, in_features = self.backend.weight_info(stored)[0]
        if input.shape[-1] != in_features:
            raise RuntimeError(
                f"The input has shape {tuple(input.shape)} and the {self.backend.bits}-bit layer "
                f"maps {in_features} to {out_features} features."
            )
        out_dtype = output_dtype(input)
        dtype = self.compute_dtype or out_dtype
        # A cast copy: bitsandbytes' own layer casts the stored bias, which changes the base.
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.product(input.to(dtype), stored, bias).to(out_dtype)


class QuantizedAttention(AttentionWeight, QuantizedLayer):
    """``nn.MultiheadAttention`` with a quantized weight for queries, keys and values.

    torch's code multiplies by a view of it, in the dtype of the input: see
    :mod:`~lightning_peft.engine.layers.weight_view`.
    """


class QuantizedConvolution(QuantizedLayer):
    """A convolution, transposed or not, with a quantized kernel.

    The kernel is dequantized for the forward pass and again for the backward pass; in between only
    the codes exist.
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
            lambda: QuantizedLayer.effective_weight(self).to(dtype),
            bias,
            output_size,
        )
        return product.to(out_dtype)

    def dense_output(self, input: Tensor) -> Tensor:
        """The convolution with the effective weight, in float32, by torch."""
        batched, geometry = convolution_geometry(self, input.float())
        weight = self.effective_weight().float()
        product: Tensor = torch.ops.aten.convolution(batched, weight, None, *geometry)
        return product


class QuantizedExperts(ExpertMixin, QuantizedLayer):
    """Mixin for :class:`~lightning_peft.engine.layers.expert_weights.ExpertWeight`."""

    num_experts: int

    def one_expert(self, index: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dequantized weight of the experts ``index``: an integer, or some."""
        if isinstance(index, slice):
            return QuantizedExperts.effective_weight(self)[index]
        if isinstance(index, Tensor) and index.ndim:
            chosen, places = index.unique(return_inverse=True)
            return torch.stack([self.one_expert(one, dtype) for one in chosen])[places]
        size = self.weight_info()[0][1]
        first = int(index) % self.num_experts * size
        return self.backend.dequantize_rows(self.stored_weight(), first, first + size, dtype)

    def effective_weight(self) -> Tensor:
        """The dequantized weight of all experts, without adapters."""
        shape = self.weight_info()[0]
        rows = shape[0] * shape[1]
        return self.backend.dequantize_rows(self.stored_weight(), 0, rows).view(shape)

    def routed_product(
        self, function: Any, rows: Tensor, index: Any, *rest: Any, **named: Any
    ) -> Tensor:
        """The product of rows ``(n, in)`` with the weight of one expert, plus a bias if given."""
        ends = [0] * int(index) + [rows.shape[0]]
        result = self._products(rows, ends)
        biases = [one for one in (*rest, *named.values()) if one is not None]
        return result + biases[0].to(result.dtype) if biases else result

    def grouped_product(self, function: Any, rows: Tensor, *rest: Any, **named: Any) -> Tensor:
        """The products of rows, sorted by expert, each with the weight of its expert."""
        ends: Any = named.get("offs", rest[0] if rest else None)
        # Without values, as if one expert got all rows: what is held at once is the same.
        known = [rows.shape[0]] if isinstance(ends, FakeTensor) else ends.tolist()
        return self._products(rows, known)

    def stacked_product(self, rows: Tensor) -> Tensor:
        """The products of rows ``(experts, n, in)`` with weights stored ``(in, out)``."""
        experts, count = rows.shape[:2]
        ends = [count * number for number in range(1, experts + 1)]
        return self._products(rows.flatten(0, 1), ends, True).unflatten(0, (experts, count))

    def _products(self, rows: Tensor, ends: list[int], as_stored: bool | None = None) -> Tensor:
        kept = output_dtype(rows)
        rows = rows.to(self.compute_dtype or kept)
        stored = self.is_transposed if as_stored is None else as_stored
        product: Tensor = _ExpertProducts.apply(rows, self, ends, stored)
        return product.to(kept)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the product of rows ``(n, in)`` with the weight of the first expert."""
        return self.routed_product(None, rows, 0)

    def dense_output(self, input: Tensor) -> Tensor:
        """The same with the effective weight, in float32, by torch."""
        weight = self.effective_expert(0).float()
        return input.float() @ (weight if self.is_transposed else weight.t())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves the constants next to the codes, which are the experts' own parameter."""
        name = parameter_name(prefix.removesuffix("."))
        for key, value in self.constants_in_state().items():
            destination[f"{name}.{key}"] = value if keep_vars else value.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The experts put the codes back: they may have no attributes yet.
        super(QuantizedLayer, self).__setstate__(state)  # type: ignore[misc]


class _ExpertProducts(torch.autograd.Function):
    """Products of groups of rows with dequantized weights, of which one exists at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: Any, ends: list[int], as_stored: bool) -> Tensor:
        ctx.layer, ctx.ends, ctx.as_stored = layer, ends, as_stored
        width = layer.weight_info()[0][2 if as_stored else 1]
        return _by_expert(rows, layer, ends, width, as_stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        width = ctx.layer.weight_info()[0][1 if ctx.as_stored else 2]
        rows = _by_expert(gradient, ctx.layer, ctx.ends, width, not ctx.as_stored)
        return rows, None, None, None


def _by_expert(rows: Tensor, layer: Any, ends: list[int], width: int, as_stored: bool) -> Tensor:
    output = rows.new_zeros(rows.shape[0], width)
    start = 0
    for index, end in enumerate(ends):
        if end > start:
            weight = layer.one_expert(index, rows.dtype)
            torch.mm(rows[start:end], weight if as_stored else weight.t(), out=output[start:end])
            del weight
            start = end
    return output

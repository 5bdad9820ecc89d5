"""Low-rank adapters that live on the adapted layer itself.

``h = W x + s B A x`` with ``A: r x in``, ``B: out x r`` and ``s = alpha / r`` (or
``alpha / sqrt(r)`` for rank-stabilised LoRA), after Hu et al. 2021 (arXiv 2106.09685) and
Kalajdzievski 2023 (arXiv 2312.03732). PEFT creates and initialises ``A`` and ``B``; names and
shapes are PEFT's, so that its files fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.backends.layers import QuantizedBackup
from lightning_peft.engine.layers.convolution import convolve, mix_channels
from lightning_peft.engine.layers.fused import fused_output
from lightning_peft.engine.layers.kinds import (
    CONVOLUTION_LIKE,
    TRANSPOSED,
    from_rows,
    has_standard_forward,
)
from lightning_peft.engine.layers.mixin import LayerMixin, add_mixin, remove_mixin, stored_parameter
from lightning_peft.engine.layers.weight_view import WeightView
from lightning_peft.errors import UnsupportedError


@dataclass
class Adapter:
    """What one adapter on one layer is, besides its tensors.

    Attributes:
        r: Rank.
        alpha: PEFT's ``lora_alpha``.
        scaling: The factor in front of ``B A``.
    """

    r: int
    alpha: float
    scaling: float


class LoraLayer(LayerMixin):
    """A layer that adds its active adapters to what it computes; one subclass per kind of layer.

    Attributes:
        lora_A: ``nn.ModuleDict`` of the layers to rank ``r``, by adapter name.
        lora_B: ``nn.ModuleDict`` of the layers from rank ``r``, by adapter name.
        lora_dropout: ``nn.ModuleDict`` of dropouts in front of ``A``.
        lora_adapters: Rank and scaling by adapter name.
        lora_active: Names of the adapters that take part in ``forward``.
        lora_enabled: ``False`` inside :func:`lightning_peft.disable_adapters`.
        lora_merged: Names of the adapters that are folded into the weight.
        lora_quantized_backup: The quantized weight that merging replaced.
        lora_is_momentum_copy: Whether the layer is in a copy that follows another part, so that its
            adapters do not train.
    """

    label = "Lora"
    # How PEFT calls the dictionaries of factors on a layer of this kind.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    lora_dropout: Any
    lora_adapters: dict[str, Adapter]
    lora_active: tuple[str, ...]
    lora_enabled: bool
    lora_merged: tuple[str, ...]
    lora_quantized_backup: QuantizedBackup | None
    lora_is_momentum_copy: bool

    def effective_adapters(self) -> list[str]:
        """Returns the adapters that this layer adds to its output now."""
        active = [name for name in self.lora_active if name in self.lora_adapters]
        return [n for n in active if n not in self.lora_merged] if self.lora_enabled else []

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Returns ``A`` and ``B`` of one adapter."""
        a, b = (getattr(self, kind)[name] for kind in self.factor_names)
        return a.weight, b.weight

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output plus what each running adapter adds to it.

        The adapters' master weights stay in their own dtype (float32); the two products are
        computed in the dtype of the input, or in autocast's. A class with a forward pass of its
        own computes with ``W + s B A`` as its weight instead, without dropout.

        Args:
            *args: What the layer takes; the first is the input.
            **kwargs: The same by name.
        """
        names = self.effective_adapters()
        if names and not has_standard_forward(self):  # type: ignore[arg-type]
            changed: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return changed
        with self.own_forward():
            result: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in names:
            x = self.lora_dropout[name](args[0] if args else next(iter(kwargs.values())))
            added = self.adapter_output(name, x, *args[1:], **kwargs)
            result = result + added.to(result.dtype)
        return result

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the contribution of one adapter to the output for ``x``, after dropout."""
        raise NotImplementedError

    def delta_weight(self, name: str) -> Tensor:
        """Returns ``s B A`` of one adapter, in the layout of the layer's weight."""
        raise NotImplementedError

    def upcast_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns ``s A`` and ``B`` in a dtype to multiply them in."""
        a, b = (factor.to(accumulation_dtype(factor)) for factor in self.factors(name))
        return a * self.lora_adapters[name].scaling, b

    def weight_is_stored(self) -> bool:
        """Whether neither quantization nor an adapter changes what the weight does."""
        return super().weight_is_stored() and not self.effective_adapters()

    def effective_weight(self) -> Tensor:
        """Returns ``W + s B A`` of the running adapters, with gradients to ``A`` and ``B``.

        Without dropout: that acts on inputs, and there are none here.
        """
        weight = super().effective_weight()
        total = weight.to(accumulation_dtype(weight))
        for name in self.effective_adapters():
            total = total + self.delta_weight(name)
        return total.to(weight.dtype)

    def get_delta_weight(self, name: str) -> Tensor:
        """Returns ``s B A`` of one adapter, in the layout of the layer's weight, detached."""
        return self.delta_weight(name).detach()

    def has_no_effect(self) -> bool:
        """Whether every adapter on the layer still adds nothing."""
        return all(
            not a.any() or not b.any() for a, b in (self.factors(n) for n in self.lora_adapters)
        )


_STATE = (
    "lora_dropout",
    "lora_adapters",
    "lora_active",
    "lora_enabled",
    "lora_merged",
    "lora_quantized_backup",
    "lora_is_momentum_copy",
)


class LoraLinear(LoraLayer):
    """``nn.Linear`` or ``Conv1D``: ``A`` is ``(r, in)`` and ``B`` is ``(out, r)``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``W x + s B A x`` for ``x`` of shape ``(..., in)``, in one step where it can."""
        fused = fused_output(self, self.effective_adapters(), args, kwargs)
        return super().forward(*args, **kwargs) if fused is None else fused

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``s B A x`` for ``x`` of shape ``(..., in)``."""
        a, b = self.factors(name)
        low = F.linear(x, a.to(x.dtype)) * self.lora_adapters[name].scaling
        return F.linear(low, b.to(low.dtype))

    def delta_weight(self, name: str) -> Tensor:
        """Returns ``s B A``."""
        a, b = self.upcast_factors(name)
        return from_rows(self, b @ a)


class LoraConvolution(LoraLayer):
    """A convolution: ``A`` has its kernel and ``r`` channels, ``B`` mixes them to ``out``.

    In PEFT's shapes ``A`` sees all input channels, also where the layer is grouped: what the
    adapter adds is then no grouped kernel, and cannot be merged.
    """

    groups: int

    def adapter_output(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``s B (A * x)`` for ``x`` of shape ``(N, in, *size)``."""
        a, b = self.factors(name)
        size = args[0] if args else kwargs.get("output_size")
        low = convolve(self, x, a.to(x.dtype), size) * self.lora_adapters[name].scaling
        return mix_channels(low, b.to(low.dtype), self.groups)

    def delta_weight(self, name: str) -> Tensor:
        """Returns ``s B A`` as a kernel.

        Raises:
            UnsupportedError: If the layer is grouped.
        """
        if self.groups > 1:
            raise UnsupportedError(
                "An adapter on a grouped convolution adds to all its input channels, so there is "
                "no weight that has it built in: it cannot be merged, nor read as `weight`. Call "
                "the layer, or leave it out by `exclude_modules`."
            )
        a, b = self.upcast_factors(name)
        if isinstance(self, TRANSPOSED):
            return torch.einsum("ir...,or->io...", a, b.flatten(1))
        return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


class LoraEmbedding(LoraLayer):
    """``nn.Embedding``: ``A`` is ``(r, tokens)`` and starts at zero, ``B`` is ``(width, r)``.

    The forward pass is the class's own. Where it looks rows up in ``weight``, it gets those of
    ``W`` plus those of ``A^T`` times ``B^T``; scales and offsets of subclasses apply to both.
    """

    factor_names = ("lora_embedding_A", "lora_embedding_B")

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Returns ``A`` and ``B`` of one adapter."""
        a, b = (getattr(self, kind)[name] for kind in self.factor_names)
        return a, b

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the class's output, with :meth:`look_up` in place of the lookup."""
        if has_standard_forward(self) and self.effective_adapters():  # type: ignore[arg-type]
            layer: Any = self
            return self.look_up(
                args[0] if args else next(iter(kwargs.values())),
                None,
                layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq,
                sparse=layer.sparse,
            )
        rows: Tensor = super(LoraLayer, self).forward(*args, **kwargs)  # type: ignore[misc]
        return rows

    @property
    def weight(self) -> Any:
        """The weight as code means it that reads it, looked up row by row where it can be."""
        view = super().weight
        if isinstance(view, WeightView):
            view.overrides[F.embedding] = self.look_up
        return view

    def look_up(self, input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``F.embedding`` of the effective weight, without making that weight."""
        stored = self._parameters["weight"]
        rows = F.embedding(input, stored, *args, **kwargs)
        for name in self.effective_adapters():
            a, b = self.factors(name)
            # Padding rows get no gradient, as in the layer's own weight.
            low = F.embedding(input, a.t(), kwargs.get("padding_idx", args[0] if args else None))
            rows = rows + ((low @ b.t()) * self.lora_adapters[name].scaling).to(rows.dtype)
        return rows

    def delta_weight(self, name: str) -> Tensor:
        """Returns ``s (B A)^T`` of shape ``(tokens, width)``."""
        a, b = self.upcast_factors(name)
        return (b @ a).t()


def lora_class(layer: nn.Module) -> type[LoraLayer]:
    """Returns the mixin for a layer of one of the adaptable kinds."""
    if isinstance(layer, CONVOLUTION_LIKE):
        return LoraConvolution
    return LoraEmbedding if isinstance(layer, nn.Embedding) else LoraLinear


@contextmanager
def without_adapters(layer: Any) -> Iterator[None]:
    """Within the body, the layer computes as if it had no adapter."""
    outer, layer.lora_enabled = layer.lora_enabled, False
    try:
        yield
    finally:
        layer.lora_enabled = outer


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype to add weights and adapters in: float32, or float64 where they are."""
    return torch.promote_types(tensor.dtype, torch.float32)


def attach(layer: Any, peft_layer: Any, name: str) -> None:
    """Moves one adapter from a PEFT layer, created around ``layer``, onto ``layer`` itself.

    Half-precision adapters become float32: they are the master weights of the optimizer.

    Args:
        layer: The layer to adapt; it keeps its identity, attributes and parameter names.
        peft_layer: PEFT's layer for ``layer``; it is not used afterwards.
        name: The adapter's name.
    """
    kind = lora_class(layer)
    if not isinstance(layer, LoraLayer):
        add_mixin(layer, kind)
        # New modules are in train mode; the layer may be inside a part that is in eval mode.
        for factor in kind.factor_names:
            holder = nn.ParameterDict() if kind is LoraEmbedding else nn.ModuleDict()
            setattr(layer, factor, holder.train(layer.training))
        layer.lora_dropout = nn.ModuleDict().train(layer.training)
        layer.lora_adapters = {}
        layer.lora_active, layer.lora_merged, layer.lora_enabled = (name,), (), True
        layer.lora_quantized_backup, layer.lora_is_momentum_copy = None, False
    for attribute in (*kind.factor_names, "lora_dropout"):
        getattr(layer, attribute)[name] = _moved(getattr(peft_layer, attribute)[name], layer)
    layer.lora_adapters[name] = Adapter(
        r=int(peft_layer.r[name]),
        alpha=float(peft_layer.lora_alpha[name]),
        scaling=float(peft_layer.scaling[name]),
    )


def _moved(made: Any, layer: Any) -> Any:
    """Returns a factor or dropout on the layer's device, in its mode and in full precision."""
    device = stored_parameter(layer, "weight").device
    if isinstance(made, nn.Parameter):
        return nn.Parameter(_full_precision(made.data.to(device)), made.requires_grad)
    for param in made.to(device).train(layer.training).parameters():
        param.data = _full_precision(param.data)
    return made


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def low_rank_factors(part: nn.Module, targets: Iterable[str], name: str) -> dict[str, Tensor]:
    """Returns ``A`` and ``B`` of one adapter on the layers ``targets``, by PEFT's keys in files."""
    found: dict[str, Tensor] = {}
    for target in targets:
        layer: Any = part.get_submodule(target)
        leaf = "" if isinstance(layer, LoraEmbedding) else ".weight"
        for kind, factor in zip(layer.factor_names, layer.factors(name), strict=True):
            found[f"{target}.{kind}{leaf}"] = factor
    return found


def detach(layer: Any) -> None:
    """Removes all adapters from ``layer`` and gives it back the class it had before."""
    for attribute in (*layer.factor_names, *_STATE):
        delattr(layer, attribute)
    remove_mixin(layer, lora_class(layer))

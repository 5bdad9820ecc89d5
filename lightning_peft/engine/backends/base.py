"""Base class of quantization backends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.engine.layers.expert_weights import ExpertWeight, run_problem
from lightning_peft.engine.layers.kinds import CONVOLUTION_LIKE, has_quantizable_class
from lightning_peft.engine.layers.mixin import stored_parameter

Config = TypeVar("Config")


class QuantizationBackend(ABC, Generic[Config]):
    """One way to store the frozen weights of layers; its instance is registered by config type.

    ``rows`` is always the weight as a matrix ``(out, in)``, with kernels unfolded. ``stored`` is
    the parameter that takes the place of the dense one: its values, with whatever belongs to them
    as attributes. Handlers have no state of their own.

    Attributes:
        name: ``quant_method`` of the config in records and YAML.
        config_type: Class of the configs.
        layer_class: Mixin for linear layers.
        convolution_class: Mixin for convolutions; ``None`` where they stay dense.
        attention_class: Mixin for ``nn.MultiheadAttention``; ``None`` where it stays dense.
        expert_class: Mixin for weights of experts; ``None`` where they stay dense.
        module_classes: Layers of the library itself, which :meth:`adopt` takes.
        layer_attributes: Attributes of a layer that :meth:`prepare` sets.
        skip_argument: Field of the config that names modules to leave dense.
        fuses_adapters: Whether product and adapter may be one step for autograd.
        leaves_freed_memory: Whether quantizing on a CPU frees much memory in between.
        quantizes_on_load: Whether weights may be quantized while ``from_pretrained`` reads them.
        compute_dtypes: Dtypes that :meth:`matmul` takes.
        peft_modules: Names of PEFT's modules with wrappers for layers of the library.
        can_be_packed: Whether codes and constants may be views of the bytes of one parameter.
        bits: Bits of a value, for reports.
        vllm_quantization: vLLM's ``--quantization`` by which it quantizes a 16-bit base alike.
    """

    name: ClassVar[str]
    config_type: ClassVar[type]
    layer_class: ClassVar[type[Any]]
    convolution_class: ClassVar[type[Any] | None] = None
    attention_class: ClassVar[type[Any] | None] = None
    expert_class: ClassVar[type[Any] | None] = None
    module_classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    layer_attributes: ClassVar[tuple[str, ...]] = ("compute_dtype",)
    skip_argument: ClassVar[str] = "skip_modules"
    fuses_adapters: ClassVar[bool] = True
    leaves_freed_memory: ClassVar[bool] = False
    quantizes_on_load: ClassVar[bool] = True
    compute_dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float16, torch.bfloat16, torch.float32}
    )
    peft_modules: ClassVar[tuple[str, ...]] = ()
    can_be_packed: ClassVar[bool] = False
    bits: ClassVar[int]
    vllm_quantization: ClassVar[str | None] = None

    def __init__(self) -> None:
        others = self.convolution_class, self.attention_class, self.expert_class
        for mixin in (self.layer_class, *others):
            if mixin is not None:
                mixin.backend = self

    # Configs.

    def accepts(self, config: Config) -> bool:
        """Whether ``config``, of the right class, means this backend."""
        return True

    def check_config(self, config: Config) -> None:
        """Refuses configs that cannot work.

        Raises:
            ConfigError, UnsupportedError: With all problems.
        """

    @abstractmethod
    def config_to_dict(self, config: Config) -> dict[str, Any]:
        """The fields that decide what the quantized weights are, as primitives."""

    @abstractmethod
    def config_from_dict(self, fields: Mapping[str, Any]) -> Config:
        """The config that :meth:`config_to_dict` wrote, or that a user wrote in YAML.

        Raises:
            ConfigError: With all problems.
        """

    def codes_settings(self, config: Config) -> dict[str, Any]:
        """The fields of :meth:`config_to_dict` that decide the stored values: the cache's key."""
        return self.config_to_dict(config)

    def label(self, fields: Mapping[str, Any]) -> str:
        """A few words for reports, from :meth:`config_to_dict`."""
        return self.name

    def skip_modules(self, config: Config) -> list[str]:
        """Names of modules that stay dense."""
        return list(getattr(config, self.skip_argument, None) or [])

    def compute_dtype(self, config: Config) -> torch.dtype | None:
        """Dtype of the products; ``None`` follows the activations."""
        return None

    # Layers.

    def unsupported_reason(self, layer: nn.Module) -> str | None:
        """Why ``layer`` cannot be quantized correctly, or ``None`` where it can."""
        if not has_quantizable_class(layer):
            return (
                f"it is a {type(layer).__name__}, and only linear layers and convolutions of torch "
                "and transformers themselves can be, since a subclass may compute in its own way. "
                f"Name it in `{self.skip_argument}`"
            )
        if self.mixin_for(layer) is None:
            kind = "weight of experts" if isinstance(layer, ExpertWeight) else type(layer).__name__
            return f"it is a {kind}, and {self.name} is for linear layers only"
        if stored_parameter(layer).is_meta:
            return (
                "it is on the meta device and has no values. Inject without a quantization config "
                "there, or load the weights first"
            )
        return None

    def mixin_for(self, layer: nn.Module) -> type[Any] | None:
        """The mixin for a quantizable layer; ``None`` where it stays dense."""
        if isinstance(layer, CONVOLUTION_LIKE):
            return self.convolution_class
        if isinstance(layer, nn.MultiheadAttention):
            return self.attention_class
        return self.expert_class if isinstance(layer, ExpertWeight) else self.layer_class

    def takes_experts(self, layer: ExpertWeight) -> bool:
        """Whether a weight of experts is quantized as linear layers are, without being named."""
        return self.expert_class is not None and run_problem(layer.owner) is None

    def base_class(self, layer: nn.Module) -> type[nn.Module] | None:
        """The library's class for ``layer``, by which other code recognizes quantized layers."""
        return None

    def prepare(self, layer: Any, config: Config, dtype: torch.dtype) -> None:
        """Sets the attributes of a layer whose weight, of ``dtype`` before, is quantized now."""
        layer.compute_dtype = self.compute_dtype(config)

    def claims(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is one of the library itself, for :meth:`adopt`."""
        return isinstance(layer, self.module_classes)

    def adopt(self, layer: Any) -> None:
        """Gives a layer that this backend claims its mixin.

        Raises:
            UnsupportedError: If its weight is not quantized yet.
        """

    def storage_problem(self, stored: Any) -> str | None:
        """What is wrong with a parameter that the library changed meanwhile, if anything is."""
        return None

    # Weights.

    @abstractmethod
    def quantize(self, rows: Tensor, config: Config, device: torch.device) -> nn.Parameter:
        """Quantizes ``rows``, of any floating dtype and on any device, to a frozen parameter.

        The result is on ``device``.
        """

    def requantize(self, stored: Any, rows: Tensor) -> Tensor | None:
        """What ``rows`` would be if they were stored as ``stored`` is; ``None`` if unknown."""
        return None

    def nearest(self, stored: Any, rows: Tensor) -> Tensor:
        """The codes that are the nearest to ``rows`` with the constants of ``stored``.

        Raises:
            NotImplementedError: If the library has no such codes.
        """
        raise NotImplementedError

    @abstractmethod
    def dequantize(self, stored: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The rows that ``stored`` stands for, in ``dtype`` or that from before quantization."""

    def dequantize_rows(
        self, stored: Any, start: int, end: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Some of the rows of :meth:`dequantize`; override it where others can stay codes."""
        return self.dequantize(stored, dtype)[start:end]

    def matmul(self, layer: Any, input: Tensor, stored: Any, bias: Tensor | None) -> Tensor:
        """``input @ rows.T + bias``, with gradients to ``input`` and ``bias``.

        Args:
            layer: The layer.
            input: ``(..., in)``, of one of :attr:`compute_dtypes`.
            stored: The weight of the layer.
            bias: ``(out,)`` in the dtype of ``input``, or ``None``.
        """
        product: Tensor = DequantizedMatmul.apply(input, bias, stored, self)
        return product

    def weight_to_multiply(self, stored: Any, dtype: torch.dtype) -> Tensor:
        """The rows in ``dtype`` as :meth:`matmul` multiplies them, in both directions."""
        return self.dequantize(stored, dtype)

    def rounds_input(self, stored: Any) -> bool:
        """Whether the layer of ``stored`` rounds its input, so that its adapters take another."""
        return False

    def multiplies_dequantized(self, device: torch.device) -> bool:
        """Whether :meth:`matmul` on ``device`` is torch's product with :meth:`dequantize`.

        A dense copy of the weight then gives the same product, bit for bit.
        """
        return type(self).matmul is QuantizationBackend.matmul

    @abstractmethod
    def owns(self, stored: Any) -> bool:
        """Whether ``stored`` is a parameter of this backend."""

    @abstractmethod
    def weight_info(self, stored: Any) -> tuple[torch.Size, torch.dtype]:
        """Shape of the rows, and the dtype from before quantization."""

    @abstractmethod
    def constants(self, stored: Any) -> list[Tensor]:
        """Scales and the like: counted in bytes and in fingerprints."""

    def tables(self, stored: Any) -> list[Tensor]:
        """Further tensors that take memory and are the same for all weights."""
        return []

    @abstractmethod
    def state_tensors(self, stored: Any) -> dict[str, Tensor]:
        """Everything that ``stored`` consists of, for files; the values are ``"codes"``."""

    @abstractmethod
    def from_state_tensors(self, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
        """The parameter on ``device`` that :meth:`state_tensors` took apart."""

    @abstractmethod
    def restore(self, stored: Any, device: torch.device) -> Any:
        """``stored`` on ``device``, as what it was: pickle turns it into an ``nn.Parameter``.

        The same parameter where nothing changes, since other layers and optimizers may hold it.
        """

    @abstractmethod
    def meta(self, rows: Tensor, config: Config) -> Any:
        """What :meth:`quantize` would make of ``rows``, which are fake or on the meta device."""

    @abstractmethod
    def map_tensors(self, stored: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """A copy of ``stored`` whose tensors went through ``function``, which keeps shapes."""

    @abstractmethod
    def stored_bytes(self, parameters: int, config: Config) -> int:
        """Bytes of so many parameters of one layer, with the constants."""

    def planning_problem(self, config: Config) -> str | None:
        """Why memory cannot be predicted for ``config``, or ``None`` where it can."""
        return None

    def workspace_bytes(
        self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> int | None:
        """Bytes that one of the library's operators takes while it runs; ``None`` for others."""
        return None

    def is_dequantization(self, operation: Any) -> bool:
        """Whether an operator's result is a dequantized weight."""
        return False


class DequantizedMatmul(torch.autograd.Function):
    """A product with a dequantized weight that exists twice, and not in between."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, bias: Tensor | None, stored: Any, backend: QuantizationBackend[Any]
    ) -> Tensor:
        """Returns the product, ``(..., out)``."""
        ctx.stored, ctx.backend, ctx.with_bias = stored, backend, bias is not None
        # Only for autograd to notice that it was changed: hooks may give back a plain tensor.
        ctx.save_for_backward(stored)
        return F.linear(input, backend.weight_to_multiply(stored, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Returns the gradients of the input and of a bias that is trained."""
        (gradient,), _ = gradients, ctx.saved_tensors
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ ctx.backend.weight_to_multiply(ctx.stored, gradient.dtype)
        if ctx.with_bias and ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_input, of_bias, None, None

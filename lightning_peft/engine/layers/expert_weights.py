"""Layers for the 3-D expert parameters of transformers 5.

``experts.gate_up_proj`` is a parameter of shape ``(experts, out, in)`` that no layer of its own
computes with. Here it gets one: a child of the experts that holds no parameter, so that names and
checkpoints of the base stay what they are, and that means this parameter by its ``weight``. Code
of transformers that reads ``self.gate_up_proj`` gets the weight of that layer: a view whose
products, expert by expert or grouped, are those of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch_distributed import is_fsdp_asking
from lightning_peft.engine.layers.mixin import (
    DynamicMixin,
    LayerMixin,
    add_mixin,
    class_key,
    remove_mixin,
    require_whole,
)
from lightning_peft.engine.layers.weight_view import WeightView
from lightning_peft.errors import UnsupportedError

# What the layer of a parameter is called in its experts: the name of the parameter, and this.
SUFFIX = "_per_expert"
# The ways of transformers to run experts that read a weight by products and by single experts.
SERVED = ("eager", "grouped_mm", "batched_mm")
# The attributes that transformers' `use_experts_implementation` gives to experts.
_MARKS = ("is_transposed", "has_gate", "has_bias", "num_experts")
# Classes of transformers without those, whose code multiplies the rows of all experts at once.
_STACKED = ("Llama4TextExperts",)
_GROUPED = [
    getattr(holder, name)
    for holder, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(holder, name)
]
_FALLBACK = "grouped_mm_fallback"
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Linked(dict[str, Any]):
    """The ``_parameters`` of a layer that has one parameter, of another module, and lists none."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def __contains__(self, key: object) -> bool:
        return key == "weight"

    def __getitem__(self, key: str) -> Any:
        if key != "weight":
            raise KeyError(key)
        return self.owner._parameters[self.name]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == "weight" else default

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "weight":
            raise KeyError(key)
        self.owner._parameters[self.name] = value


class ExpertWeight(nn.Module):
    """The products of rows with the weights of the experts that the rows were routed to.

    Args:
        owner: The experts.
        parameter_name: Their parameter of shape ``(experts, out, in)``, or ``(experts, in, out)``
            where the class of the experts says ``is_transposed``.
    """

    owner: Any
    parameter_name: str

    def __init__(self, owner: nn.Module, parameter_name: str) -> None:
        super().__init__()
        # Not as submodule and parameter: both are the experts' own.
        self.__dict__.update(owner=owner, parameter_name=parameter_name)
        self.__dict__["_parameters"] = _Linked(owner, parameter_name)

    @property
    def is_transposed(self) -> bool:
        """Whether adapters take a weight for ``(in, out)``: as in PEFT, where the class says so."""
        return bool(getattr(self.__dict__["owner"], "is_transposed", False))

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return int(self.__dict__["owner"].num_experts)

    def one_expert(self, index: Any) -> Tensor:
        """Returns the frozen weight of the experts ``index``: an integer, or some."""
        stored: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        require_whole(stored)
        return stored[index]

    def routed_product(
        self, function: Any, rows: Tensor, index: Any, *rest: Any, **named: Any
    ) -> Tensor:
        """Returns ``function(rows, weight of expert index)``, torch's linear map or product."""
        result: Tensor = function(rows, self.one_expert(index), *rest, **named)
        return result

    def stacked_product(self, rows: Tensor) -> Tensor:
        """Returns the products of rows ``(experts, n, in)`` with weights stored ``(in, out)``."""
        return torch.bmm(rows, self.one_expert(slice(None)))

    def grouped_product(self, function: Any, rows: Tensor, *rest: Any, **named: Any) -> Tensor:
        """Returns ``function(rows, all weights, ends of the groups)``, torch's grouped product."""
        weight = self.one_expert(slice(None))
        weight = weight if self.is_transposed else weight.transpose(-2, -1)
        result: Tensor = function(rows, weight, *rest, **named)
        return result


class ExpertMixin(LayerMixin):
    """Base of the mixins for :class:`ExpertWeight`: its weight is a view with routed products."""

    # PEFT's adapter on the parameter is the same: a product that is added to the weight.
    standard_forward = True
    is_transposed: bool

    @property
    def weight(self) -> Any:
        """The weight as the code of the experts reads it."""
        view = super().weight
        if isinstance(view, WeightView):
            view.overrides[Tensor.__getitem__] = self._select
            view.overrides[torch.bmm] = self._stacked
            if self.is_transposed:
                self._group(view)
            else:
                view.overrides[Tensor.transpose] = self._transpose
        return view

    def _group(self, view: WeightView) -> None:
        fallback = getattr(torch.ops.transformers, _FALLBACK, None)
        for function in (*_GROUPED, *([fallback] if fallback is not None else [])):
            view.overrides[function] = partial(self._grouped, function)
        # Asked for its alignment, by which transformers chooses one of them.
        view.overrides[Tensor.data_ptr] = lambda one: one.stored.data_ptr()

    def _transpose(self, view: WeightView, first: int, second: int) -> Any:
        if {first % 3, second % 3} != {1, 2}:
            return self.effective_weight().transpose(first, second)
        shape = torch.Size((view.shape[0], view.shape[2], view.shape[1]))
        turned = WeightView(
            lambda: self.effective_weight().transpose(-2, -1), shape, view.dtype, view.stored
        )
        self._group(turned)
        return turned

    def _select(self, view: WeightView, index: Any) -> Any:
        if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
            shape = torch.Size((index.shape[0], *view.shape[1:]))
            functions: tuple[Any, ...] = (torch.bmm,)
        elif isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            shape = view.shape[1:]
            functions = _MATMUL if self.is_transposed else (F.linear,)
        else:
            return self.effective_weight()[index]
        one = WeightView(lambda: self.effective_expert(index), shape, view.dtype, view.stored)
        for function in functions:
            one.overrides[function] = partial(self._selected, function, index)
        return one

    def _selected(self, function: Any, index: Any, *args: Any, **named: Any) -> Tensor:
        if function is torch.bmm:
            return self._batched(index, *args)
        if isinstance(args[0], WeightView):
            turned: Tensor = function(self.effective_expert(index), *args[1:], **named)
            return turned
        rows, _, *rest = args
        layer: Any = self
        result: Tensor = layer.routed_product(function, rows, index, *rest, **named)
        added = self.added_product(rows, index)
        return result if added is None else result + added.to(result.dtype)

    def _batched(self, index: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """``bmm`` of a weight for each row with that row, as transformers writes it."""
        layer: Any = self
        weight = layer.one_expert(index)
        if isinstance(one, WeightView):
            result, rows = torch.bmm(weight, other), other.transpose(-2, -1)
        else:
            result, rows = torch.bmm(one, weight), one
        added = self.added_batched(rows, index)
        if added is None:
            return result
        turned = added.transpose(-2, -1) if isinstance(one, WeightView) else added
        return result + turned.to(result.dtype)

    def _grouped(self, function: Any, rows: Tensor, _: Any, *rest: Any, **named: Any) -> Tensor:
        layer: Any = self
        result: Tensor = layer.grouped_product(function, rows, *rest, **named)
        added = self.added_grouped(function, rows, *rest, **named)
        return result if added is None else result + added.to(result.dtype)

    def _stacked(self, rows: Tensor, weight: Any) -> Tensor:
        """``bmm`` of the rows of all experts with their weights, as Llama 4 writes it."""
        layer: Any = self
        if isinstance(rows, WeightView):
            return torch.bmm(layer.effective_weight(), weight)
        result: Tensor = layer.stacked_product(rows)
        added = self.added_stacked(rows)
        return result if added is None else result + added.to(result.dtype)

    def effective_expert(self, index: Any) -> Tensor:
        """Returns the weight that the layer computes with for the experts ``index``."""
        layer: Any = self
        weight: Tensor = layer.one_expert(index)
        return weight

    def added_product(self, rows: Tensor, index: Any) -> Tensor | None:
        """What is added to the product of rows ``(n, in)`` with the weight of one expert."""
        return None

    def added_batched(self, rows: Tensor, index: Tensor) -> Tensor | None:
        """What is added to the products of rows ``(n, 1, in)`` with a weight for each."""
        return None

    def added_stacked(self, rows: Tensor) -> Tensor | None:
        """What is added to :meth:`ExpertWeight.stacked_product`."""
        return None

    def added_grouped(self, function: Any, rows: Tensor, *rest: Any, **named: Any) -> Tensor | None:
        """What is added to a grouped product; see :meth:`ExpertWeight.grouped_product`."""
        return None


class RoutedExperts(DynamicMixin):
    """Mixin for experts whose parameters are read through their layers."""

    label = "Routed"

    def __getattr__(self, name: str) -> Any:
        layer = self.__dict__.get("_modules", {}).get(f"{name}{SUFFIX}")
        if isinstance(layer, ExpertWeight):
            # As in `LayerMixin.read_weight`.
            if getattr(layer, "is_sharded", False) and is_fsdp_asking(sys._getframe(1)):
                return layer._parameters["weight"]
            return layer.weight
        return super().__getattr__(name)  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for layer in _layers_of(self).values():
            backend = getattr(layer, "backend", None)
            if backend is not None:
                stored: Any = layer._parameters["weight"]
                layer._parameters["weight"] = backend.restore(stored, stored.device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of the class of the experts."""
        problem = run_problem(self)
        if problem is not None:
            raise UnsupportedError(f"Experts with adapters or quantized weights: {problem}.")
        layers = _layers_of(self)
        for layer in layers.values():
            layer.__dict__["kept_factors"] = {}
        try:
            result: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for layer in layers.values():
                layer.__dict__.pop("kept_factors", None)
        return result


def run_problem(experts: Any) -> str | None:
    """Why the way in which transformers runs ``experts`` is not served, or ``None``."""
    way = getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"
    if way not in SERVED:
        return (
            f"experts_implementation={way!r} passes whole weights to kernels of its own. Use one "
            f"of {', '.join(SERVED)}: model.set_experts_implementation('grouped_mm')"
        )
    if getattr(experts, "_is_expert_parallel", False):
        return "they are spread over processes (expert parallelism). Load the model without"
    return None


def expert_parameters(module: nn.Module) -> list[str]:
    """Returns the names of the parameters of ``module`` that are weights of experts.

    Those of classes that transformers runs by its own code for experts; others keep and use such
    parameters in ways of their own.
    """
    origin = class_key(module)[2]
    stacks = origin.__name__ in _STACKED and origin.__module__.startswith("transformers.")
    if not stacks and not all(mark in vars(module) for mark in _MARKS):
        return []
    return [
        name
        for name, param in module._parameters.items()
        if param is not None
        and param.ndim == 3
        and name in ("gate_up_proj", "up_proj", "down_proj")
    ]


def _layers_of(experts: Any) -> dict[str, ExpertWeight]:
    return {n: child for n, child in experts._modules.items() if isinstance(child, ExpertWeight)}


def weight_name(layer: str, key: str = "weight") -> str:
    """Returns the name of the parameter, called ``key`` in it, that is the weight of a layer."""
    name = parameter_name(layer)
    return f"{name}.{key}".lstrip(".") if name == layer else name


def layer_name(parameter: str) -> str:
    """Returns the name that the layer of a parameter of experts has."""
    return f"{parameter}{SUFFIX}"


def parameter_name(layer: str) -> str:
    """Returns the name of the parameter that the layer of that name is for; others as they are."""
    return layer.removesuffix(SUFFIX)


@contextmanager
def exposed_experts(module: nn.Module) -> Iterator[None]:
    """Within the body, every weight of experts in ``module`` has a layer.

    Afterwards those have one that got an adapter or codes.
    """
    expose_experts(module)
    try:
        yield
    finally:
        withdraw_experts(module)


def expose_experts(module: nn.Module) -> None:
    """Gives every weight of experts in ``module`` a layer; see :func:`withdraw_experts`."""
    for child in list(module.modules()):
        for name in expert_parameters(child):
            if layer_name(name) in child._modules:
                continue
            if not isinstance(child, RoutedExperts):
                add_mixin(child, RoutedExperts)
            child.add_module(layer_name(name), ExpertWeight(child, name).train(child.training))


def withdraw_experts(module: nn.Module) -> None:
    """Takes away the layers of weights of experts that have neither an adapter nor codes."""
    for child in list(module.modules()):
        if not isinstance(child, RoutedExperts):
            continue
        for name, layer in _layers_of(child).items():
            if not isinstance(layer, LayerMixin):
                del child._modules[name]
        if not _layers_of(child):
            remove_mixin(child, RoutedExperts)

"""A computed ``weight`` attribute, for code that reads ``layer.weight`` directly.

Modules such as ``nn.MultiheadAttention``, the fast path of ``nn.TransformerEncoderLayer`` or a
fused ``F.linear(x, self.qkv.weight)`` never call the layer whose weight they use. An adapter that
only changes ``forward`` would be trained and ignored, and packed 4-bit codes would be taken for
numbers. Products with such a weight compute it again in the backward pass: until then it takes no
memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.compat.torch import (
    attention_of_subclasses,
    is_functional,
    make_wrapper_subclass,
    tree_leaves,
    tree_map,
    without_torch_function,
)
from lightning_peft.engine.layers.operation_contexts import paused_recording, without_autocast
from lightning_peft.errors import UnsupportedError

# Questions about a weight that need no value of it. Modules ask them in every forward pass, for
# example transformers' T5, which casts activations to `self.wo.weight.dtype`.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_cpu")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "__len__")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex")),
}
# Questions about the parameter, and the answers that freezing code gives.
_PARAMETER_STATE = {
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "is_leaf")),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    Tensor.requires_grad_,
}
_PIECES = (torch.split, Tensor.split, torch.chunk, Tensor.chunk)
_WRITES = {
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__",
}  # fmt: skip


class WeightView(Tensor):
    """Shape, dtype and device of a weight at once; its values, with gradients, on first use.

    Attributes:
        compute: Returns the values.
        addressed: The values, once their address was asked for.
        stored: The parameter behind it; attributes that a tensor does not have are read from it.
        overrides: Functions that need not see the values, and what to call in their place.
    """

    compute: Callable[[], Tensor]
    addressed: Tensor
    stored: Any
    overrides: dict[Any, Callable[..., Any]]

    # What isinstance(weight, nn.Parameter) looks at.
    _is_param = True

    @staticmethod
    def __new__(
        cls: type[WeightView],
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        stored: Any,
    ) -> WeightView:
        """Returns a view without storage."""
        view: WeightView = make_wrapper_subclass(cls, shape, dtype=dtype, device=stored.device)
        view.compute, view.stored, view.overrides = compute, stored, {}
        return view

    def __getattr__(self, name: str) -> Any:
        # Reached for names that tensors do not have, such as `quant_state` or `SCB`.
        return getattr(self.__dict__["stored"], name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answers what is known, computes the values for everything else."""
        named = kwargs or {}
        if func in METADATA:
            with without_torch_function():
                return func(*args, **named)
        for view in args:
            if isinstance(view, cls) and func in view.overrides:
                return view.overrides[func](*args, **named)
        if func == F.multi_head_attention_forward:
            return attention_of_subclasses(*args, **named)
        if func == F.linear and _is_weight_alone(args, named):
            with paused_recording():
                return _Product.apply(*args, *named.values())
        if args and isinstance(args[0], cls):
            if func in _PIECES:
                return _rows(func, *args, **named)
            if func in _PARAMETER_STATE:
                return func(args[0].stored, *args[1:])
            if func == Tensor.data.__get__:  # type: ignore[attr-defined]
                return args[0]
            _refuse_replacing(func, sys._getframe(1).f_code)
            if func == Tensor.data_ptr:
                # As long as the view lives, for kernels that get an address.
                args[0].addressed = args[0].compute().detach().contiguous()
                return args[0].addressed.data_ptr()
        # `nn.init` gives the tensor by name, `torch._foreach_mul_` a list of them.
        written = [args[0] if args else next(iter(named.values()), None)]
        _refuse_writing(func, written, named.get("out"))
        return func(*tree_map(_materialized, args), **tree_map(_materialized, named))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The same for calls that come from C++."""
        return func(*tree_map(_materialized, args), **tree_map(_materialized, kwargs or {}))


class _WithGradient(torch.autograd.Function):
    """Makes a view whose gradient, where a function computes one, goes to what it is made of.

    Code that Python sees computes with the values and never needs it. An autograd function of the
    module's own, or an operation in C++, takes the view itself.
    """

    @staticmethod
    def forward(ctx: Any, make: Callable[[], WeightView], *sources: Tensor) -> WeightView:
        """Returns the view that ``make`` makes; ``sources`` get its gradient."""
        view = make()
        ctx.compute, ctx.sources = view.compute, sources
        return view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the values once more, and their gradients."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            values = ctx.compute()
        options: dict[str, bool] = {"allow_unused": True, "create_graph": again}
        return None, *torch.autograd.grad(values, ctx.sources, grad, **options)


class _Product(torch.autograd.Function):
    """A linear map whose weight is a view, with values in each direction, and not in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, view: WeightView, bias: Tensor | None = None) -> Tensor:
        """Returns ``x W^T + bias``, in the dtype of autocast where it is enabled."""
        ctx.save_for_backward(x)
        ctx.compute, ctx.with_bias = view.compute, bias is not None
        return F.linear(x, view.compute(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the input, the weight and the bias, where something trains."""
        (x,), (gradient,) = ctx.saved_tensors, gradients
        for_x, for_weight, *for_bias = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        with without_autocast(gradient):
            if for_x:
                of_x = (gradient @ ctx.compute().to(gradient.dtype)).to(x.dtype)
            rows = gradient.reshape(-1, gradient.shape[-1])
            if for_weight:
                of_weight = rows.t() @ x.to(rows.dtype).reshape(-1, x.shape[-1])
            if any(for_bias):
                of_bias = rows.sum(0)
        return of_x, of_weight, of_bias


class _Rows(torch.autograd.Function):
    """Some rows of a view, as a view."""

    @staticmethod
    def forward(ctx: Any, view: WeightView, start: int, end: int) -> WeightView:
        ctx.shape, ctx.rows, compute = view.shape, slice(start, end), view.compute
        shape = torch.Size((end - start, *view.shape[1:]))
        return WeightView(lambda: compute()[start:end], shape, view.dtype, view.stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = gradients[0].new_zeros(ctx.shape)
        whole[ctx.rows] = gradients[0]
        return whole, None, None


def _is_weight_alone(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether arguments of a linear map are those of :class:`_Product`, with a view as weight."""
    if is_functional() or len(args) < 2 or not {*named} <= {"bias"}:
        return False
    others = [args[0], *args[2:], *named.values()]
    return isinstance(args[1], WeightView) and not any(isinstance(x, WeightView) for x in others)


def _rows(func: Any, view: WeightView, *rest: Any, **named: Any) -> Any:
    """Returns views of the pieces that torch's ``split`` and ``chunk`` make."""
    pieces = func(torch.empty(view.shape, device="meta"), *rest, **named)
    if is_functional() or any(piece.shape[1:] != view.shape[1:] for piece in pieces):
        return func(view.compute(), *rest, **named)
    ends = [0, *accumulate(len(piece) for piece in pieces)]
    return tuple(_Rows.apply(view, start, end) for start, end in pairwise(ends))


def with_gradient(make: Callable[[], WeightView], sources: Iterable[Tensor]) -> WeightView:
    """Returns the view that ``make`` makes, with gradients to the ``sources`` that train."""
    trained = [source for source in sources if source.requires_grad]
    if not trained or not torch.is_grad_enabled() or is_functional():
        return make()
    view: WeightView = _WithGradient.apply(make, *trained)
    return view


def _materialized(value: Any) -> Any:
    if not isinstance(value, WeightView):
        return value
    try:
        return value.compute()
    except KeyError as error:
        # weight_norm takes the parameter off the layer before it computes with it.
        if error.args != ("weight",):
            raise
        raise replacement_error("weight") from error


def replacement_error(name: str) -> UnsupportedError:
    """Returns the error for code that puts something else in the place of a parameter."""
    return UnsupportedError(
        f"{name} of an adapted or quantized layer would be replaced, as pruning, weight_norm, "
        "spectral_norm and other parametrizations do: the frozen one is what the adapters are "
        "trained on, and no checkpoint would hold the new one. Do this before adapters are added, "
        "or after lightning_peft.unload; layers outside of the adapted part, such as heads, may "
        "change. For a copy of the values: layer.weight.detach().clone()."
    )


# Where torch asks a tensor what it asks before it makes a parameter of it.
_GRAD_FN: Any = Tensor.grad_fn
_MAKING = {
    nn.Module.register_parameter.__code__: _GRAD_FN.__get__,
    nn.Parameter.__new__.__code__: Tensor.detach,
}


def _refuse_replacing(func: Any, caller: Any) -> None:
    if func == _MAKING.get(caller):
        raise replacement_error("weight")


def _refuse_writing(func: Any, written: Any, out: Any) -> None:
    name = getattr(func, "__name__", "")
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    changed = [written, out] if writes else [out]
    if any(isinstance(leaf, WeightView) for leaf in tree_leaves(changed)):
        raise UnsupportedError(
            f"{name} on the weight of an adapted or quantized layer: the weight that other code "
            "sees is computed from the frozen one, so the change would be lost. Change the weight "
            "before adapters are added, or after lightning_peft.unload."
        )

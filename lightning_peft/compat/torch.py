"""Private parts of torch: operations, hooks, storages and dispatch modes."""

from __future__ import annotations

import functools
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# Public alternative: none; they are what torch.export and FSDP plan with.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn import functional as F
from torch.nn.modules import batchnorm, conv, loss

# Public alternative: none; torch calls dispatch modes experimental.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

# Public alternative: torch.utils.pytree, announced and not in 2.13.
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_iter as tree_iter
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

# Public alternative: none.
from torch.utils.data._utils import signal_handling

# Public alternative: the public subclasses, which classes of users need not derive from.
BatchNorm = batchnorm._BatchNorm
ConvNd, ConvTransposeNd = conv._ConvNd, conv._ConvTransposeNd
Loss = loss._Loss
# The method of a convolution that computes it, apart from its padding.
CONVOLUTION_FORWARD = "_conv_forward"

_aten = torch.ops.aten
# Operations that torch does not mark as pointwise, and that make new memory for their results.
CHEAP_OPERATIONS = {
    _aten._to_copy.default, _aten.clone.default, _aten.cat.default, _aten.stack.default,
    _aten.native_layer_norm.default, _aten.native_group_norm.default,
    _aten._fused_rms_norm.default, _aten._softmax.default, _aten._log_softmax.default,
    _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.var_mean.correction,
    _aten.constant_pad_nd.default,
}  # fmt: skip
# What ``tensor.item()`` and ``bool(tensor)`` become.
item_operation = _aten._local_scalar_dense.default
# A view without the check that its memory is not shared with the result.
unsafe_view: Any = _aten._unsafe_view.default


@contextmanager
def compiled_late() -> Iterator[None]:
    """Within the body, ``torch.compile`` compiles functions when they are called first.

    Packages that compile functions of theirs as they are imported load the compiler with it, which
    takes a second, also where none of these functions is ever called. Modules, and other things
    that are more than a call, are compiled at once.
    """
    compile = torch.compile

    def late(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(late, **options)
        if not isinstance(model, FunctionType):
            return compile(model, **options)
        compiled = functools.cache(lambda: compile(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = late
    try:
        yield
    finally:
        torch.compile = compile


def softmax_backward(of_output: Tensor, output: Tensor) -> Tensor:
    """Returns the gradient of a softmax's input along the last dimension, in one operation."""
    found: Tensor = _aten._softmax_backward_data(of_output, output, -1, output.dtype)
    return found


# The innermost dispatch mode, or ``None``; and a context in which it sees nothing.
current_dispatch_mode: Any = _get_current_dispatch_mode
pause_dispatch_mode: Any = _pop_mode_temporarily

# Public alternative: torch.compiler.disable, which imports all of torch._dynamo at once.
disable_compile: Any = torch._disable_dynamo
# Public alternative: none.
make_wrapper_subclass: Any = Tensor._make_wrapper_subclass
without_torch_function: Any = torch._C.DisableTorchFunctionSubclass
# ``F.multi_head_attention_forward``, whose products get subclasses of tensors as they are; torch's
# own gives the whole call to the subclass. Public alternative: none.
attention_of_subclasses: Any = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def schema_of(operation: Any) -> Any:
    """Returns the schema of an operation; ``None`` where it has none."""
    return getattr(operation, "_schema", None)


@functools.cache
def flop_formula(operation: Any) -> Any:
    """Returns torch's formula for the FLOPs of an operation; ``None`` where it has none.

    Those that change a tensor in place, and attention on CPUs, are counted as their relatives.
    Public alternative: ``FlopCounterMode``, which knows neither of them.
    """
    namespace, _, name = operation.name().partition("::")
    if namespace != "aten":
        return None
    name = name.partition(".")[0].replace("_for_cpu", "").removesuffix("_")
    registry = import_module("torch.utils.flop_counter").flop_registry
    return registry.get(getattr(_aten, name, None))


def version_of(tensor: Tensor | None) -> int:
    """Returns how often a tensor was changed in place; -1 where that is not counted."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """Returns the address of a storage object; no other has it while a reference exists.

    Public alternative: ``data_ptr()``, which is zero without values.
    """
    return storage._cdata


def saved_tensors_hooks_in_use() -> tuple[Any, Any] | None:
    """Returns the innermost hooks on saved tensors: ``pack`` and ``unpack``."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else (hooks[0], hooks[1])


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in ("AutocastCUDA", "AutocastXPU", "AutocastMPS"):
    if hasattr(torch._C.DispatchKey, _key):
        _AUTOCAST = _AUTOCAST | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))


def without_autocast_key() -> AbstractContextManager[Any]:
    """Within the body, operations skip autocast on all devices.

    Public alternative: ``torch.autocast(device, enabled=False)``, one for each device.
    """
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def detach_sharing_version(tensor: Tensor) -> Tensor:
    """Returns ``tensor.detach()`` inside of a dispatch mode, with the version counter shared."""
    # Below autograd, where operations are recorded, a view would get a version of its own.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def is_functional() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work.

    Public alternative: none.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def is_traced(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs a module, or something inside of it."""
    # By name: torch._dynamo takes seconds to import.
    return any(is_compiled(m) or type(m).__name__ == "OptimizedModule" for m in module.modules())


def persistent_buffers(module: nn.Module) -> list[str]:
    """Returns the names of a module's own buffers that are in its state dict."""
    # Not from `_buffers`: that of a ScriptModule cannot be iterated.
    named = module.named_buffers(recurse=False, remove_duplicate=False)
    return [name for name, _ in named if name not in module._non_persistent_buffers_set]


def save_to_state_dict(module: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Writes a module's own parameters and buffers, as torch does, into ``destination``."""
    nn.Module._save_to_state_dict(module, destination, prefix, keep_vars)


def convolution_padding(layer: Any) -> list[int]:
    """Returns the padding of a convolution in the order that ``F.pad`` takes."""
    padding: list[int] = layer._reversed_padding_repeated_twice
    return padding


def output_padding(layer: Any, input: Tensor, output_size: list[int] | None) -> Any:
    """Returns the output padding of a transposed convolution for the requested size."""
    return layer._output_padding(
        input,
        output_size,
        layer.stride,
        layer.padding,
        layer.kernel_size,
        len(layer.kernel_size),
        layer.dilation,
    )


def has_load_state_dict_hooks(optimizer: Any) -> bool:
    """Whether an optimizer has hooks on ``load_state_dict``."""
    return bool(
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )


# What of an optimizer's private attributes LR schedulers and hooks use.
SHARED_OPTIMIZER_ATTRIBUTES = ("_opt_called", "_optimizer_")
OPTIMIZER_HOOKS = "_optimizer_"


def is_lr_scheduler_step(step: Any, cls: type) -> bool:
    """Whether ``step`` is what LR schedulers put on an optimizer around ``cls.step``."""
    inner = getattr(step, "__wrapped__", None)
    return hasattr(step, "_wrapped_by_lr_sched") and inner is cls.step  # type: ignore[attr-defined]


def lr_scheduler_step(optimizer: Any) -> Callable[..., Any]:
    """The replacement of ``step`` by LR schedulers, around the step of the new class.

    Theirs holds the old class's function, which would still be called.
    """
    reference = weakref.ref(optimizer)

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        current: Any = reference()
        current._opt_called = True
        return type(current).step(current, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step


def forget_parameter_count(optimizer: torch.optim.LBFGS) -> None:
    """Makes LBFGS count its parameters again."""
    optimizer._numel_cache = None


def notice_ended_workers() -> None:
    """Lets the next DataLoader notice at once that a worker has ended.

    torch sets its handler for that once in a process; a Trainer whose fit began before and ends
    afterwards puts back the default one, as it does with all signals.
    """
    child = getattr(signal, "SIGCHLD", None)
    if child is not None and not callable(signal.getsignal(child)):
        signal_handling._SIGCHLD_handler_set = False


def stop_workers(loader: Any) -> None:
    """Ends the processes of the iterator of a ``DataLoader``, if it has any."""
    # Public alternative: `del`, which does nothing as long as a traceback holds the iterator.
    stop = getattr(loader, "_shutdown_workers", None)
    if stop is not None:
        stop()


def set_batch_size(loader: Any, size: int) -> None:
    """Lets a ``DataLoader`` that has torch's own ``BatchSampler`` make batches of ``size`` rows.

    Its next iterator does. Public alternative: a new one, which all who hold the old one miss.
    """
    loader.batch_sampler.batch_size = size
    loader.__dict__["batch_size"] = size  # Assigning it is refused: it would change nothing.


class StoredFlatWeights:
    """Recurrent layers whose attributes may mean other weights than those that they store.

    Their list for the kernel holds the stored ones. Public alternative: none; `RNNBase` makes the
    list of its attributes, and again where one of them is another object than before.
    """

    def _update_flat_weights(self) -> None:
        """Leaves the list to :func:`flat_weights`."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        with layer.own_forward():
            return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __setstate__(self, state: Any) -> None:
        layer: Any = self
        with layer.own_forward():
            super().__setstate__(state)  # type: ignore[misc]


@contextmanager
def flat_weights(layer: Any, changed: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the body, the kernel of a recurrent layer gets the weights ``changed``, by name.

    On CUDA cuDNN copies them into one piece first, as for any weights that do not lie in one.
    """
    before = layer._flat_weights
    held = layer._parameters
    layer._flat_weights = [changed.get(name, held.get(name)) for name in layer._flat_weights_names]
    try:
        yield
    finally:
        layer._flat_weights = before

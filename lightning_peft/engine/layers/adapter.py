"""Base class of in-place adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.compat.peft import enable_layer
from lightning_peft.engine.backends.layers import QuantizedBackup
from lightning_peft.engine.layers.kinds import has_standard_forward
from lightning_peft.engine.layers.mixin import LayerMixin, add_mixin, remove_mixin

_STATE = (
    "adapter_settings",
    "active_adapters",
    "merged_adapters",
    "quantized_backup",
    "is_momentum_copy",
    "disable_adapters",
)


class AdapterLayer(LayerMixin):
    """A layer that computes with its active adapters; one subclass per method and kind of layer.

    Names are those of PEFT's ``BaseTunerLayer``.

    Attributes:
        adapter_layer_names: PEFT's names of the dictionaries of tensors that train, by adapter.
        adapter_module_names: The same of other modules that an adapter needs, such as dropout.
        adapter_settings: Numbers that an adapter needs, by adapter.
        active_adapters: Names of the adapters that take part in ``forward``.
        disable_adapters: Whether they are switched off.
        merged_adapters: Names of the adapters that are folded into the weight.
        quantized_backup: The quantized weight that merging replaced.
        is_momentum_copy: Whether the layer is in a copy that follows another part, so that its
            adapters do not train.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]]
    adapter_module_names: ClassVar[tuple[str, ...]] = ()

    adapter_settings: dict[str, Any]
    active_adapters: tuple[str, ...]
    merged_adapters: tuple[str, ...]
    quantized_backup: QuantizedBackup | None
    is_momentum_copy: bool
    disable_adapters: bool

    # What a method says of itself.

    def adapted_forward(self, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with the adapters ``names``; see :meth:`base_forward`."""
        raise NotImplementedError

    def delta_weight(self, name: str, weight: Tensor) -> Tensor:
        """What one adapter adds to ``weight``, with gradients."""
        raise NotImplementedError

    def restored_weight(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """The weight before the adapters ``names`` were folded into ``weight``."""
        return weight - self.summed_delta(weight, names)

    def has_no_effect(self) -> bool:
        """Whether it is known that every adapter on the layer changes nothing yet."""
        return False

    def conflict(self, names: Sequence[str]) -> str | None:
        """Why the adapters ``names`` cannot run together, or ``None``."""
        return None

    @classmethod
    def settings_of(cls, peft_layer: Any, name: str) -> Any:
        """The numbers that one adapter needs besides its tensors, from PEFT's layer."""
        return None

    def start_adapter(self, name: str) -> None:
        """Sets values of a new adapter that depend on the weight as it is now, quantized or not."""

    # The same for all methods.

    def effective_adapters(self) -> list[str]:
        """Returns the adapters that this layer computes with now."""
        if self.disable_adapters:
            return []
        active = [name for name in self.active_adapters if name in self.adapter_settings]
        return [name for name in active if name not in self.merged_adapters]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """Returns the tensors of one adapter by PEFT's keys in files, relative to the layer."""
        found: dict[str, nn.Parameter] = {}
        for kind in self.adapter_layer_names:
            held = getattr(self, kind)[name]
            if isinstance(held, nn.Parameter):
                found[kind] = held
            else:
                found |= {f"{kind}.{key}": param for key, param in held.named_parameters()}
        return found

    def train_adapters(self, names: Sequence[str]) -> None:
        """Lets the adapters ``names`` get gradients, and no others; in a copy none."""
        for name in self.adapter_settings:
            for param in self.adapter_tensors(name).values():
                param.requires_grad_(name in names and not self.is_momentum_copy)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the layer's own output with each running adapter in it.

        A class with a forward pass of its own computes with the effective weight instead.
        """
        names = self.effective_adapters()
        if names and not has_standard_forward(self):  # type: ignore[arg-type]
            changed: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return changed
        return self.adapted_forward(names, *args, **kwargs)

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the output of the layer without adapters, quantized or not."""
        with self.own_forward():
            result: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return result

    def weight_is_stored(self) -> bool:
        """Whether neither quantization nor an adapter changes what the weight does."""
        return super().weight_is_stored() and not self.effective_adapters()

    def effective_weight(self) -> Tensor:
        """Returns the weight with the running adapters in it, with gradients to these.

        Without dropout: that acts on inputs, and there are none here.
        """
        weight = super().effective_weight()
        base = total = weight.to(accumulation_dtype(weight))
        for name in self.effective_adapters():
            total = total + self.delta_weight(name, base)
        return total.to(weight.dtype)

    def weight_as_now(
        self, compute: Callable[[], Tensor]
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Returns ``compute`` with the adapters that run now, and the tensors of these."""
        names = tuple(self.effective_adapters())

        def computed() -> Tensor:
            # A backward pass may come where others run. Merged ones are in the weight by then.
            before = self.active_adapters, self.disable_adapters
            self.active_adapters, self.disable_adapters = names, False
            try:
                return compute()
            finally:
                self.active_adapters, self.disable_adapters = before

        return computed, [x for name in names for x in self.adapter_tensors(name).values()]

    def summed_delta(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        """The sum of what the adapters ``names`` add to ``weight``, on its device."""
        deltas = [self.delta_weight(name, weight).to(weight.device) for name in names]
        return torch.stack(deltas).sum(0)


def enable_adapters(layer: Any, enabled: bool) -> None:
    """Switches the adapters of one layer, in place or PEFT's, on or off."""
    if isinstance(layer, AdapterLayer):
        layer.disable_adapters = not enabled
    else:
        enable_layer(layer, enabled)


@contextmanager
def without_adapters(layer: Any) -> Iterator[None]:
    """Within the body, a layer, adapted in place or by PEFT, computes as if it had no adapter."""
    enabled = not layer.disable_adapters
    enable_adapters(layer, False)
    try:
        yield
    finally:
        enable_adapters(layer, enabled)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype to add weights and adapters in: float32, or float64 where they are."""
    return torch.promote_types(tensor.dtype, torch.float32)


def attach(layer: Any, kind: type[AdapterLayer], peft_layer: Any, name: str) -> None:
    """Moves one adapter from a PEFT layer, created around ``layer``, onto ``layer`` itself.

    Half-precision adapters become float32: they are the master weights of the optimizer.
    """
    attributes = (*kind.adapter_layer_names, *kind.adapter_module_names)
    made = {attribute: getattr(peft_layer, attribute)[name] for attribute in attributes}
    if not isinstance(layer, AdapterLayer):
        add_mixin(layer, kind)
        for attribute, value in made.items():
            # New modules are in train mode; the layer may be inside a part that is in eval mode.
            holder = nn.ParameterDict() if isinstance(value, nn.Parameter) else nn.ModuleDict()
            setattr(layer, attribute, holder.train(layer.training))
        layer.adapter_settings = {}
        layer.active_adapters, layer.merged_adapters, layer.disable_adapters = (name,), (), False
        layer.quantized_backup, layer.is_momentum_copy = None, False
    for attribute, value in made.items():
        getattr(layer, attribute)[name] = _moved(value, layer)
    layer.adapter_settings[name] = kind.settings_of(peft_layer, name)
    layer.start_adapter(name)


def _moved(made: Any, layer: Any) -> Any:
    """Returns a tensor or module on the layer's device, in its mode and in full precision."""
    held = [param for param in layer._parameters.values() if param is not None]
    # A weight of experts is theirs.
    device = (held[0] if held else layer._parameters["weight"]).device
    if isinstance(made, nn.Parameter):
        return nn.Parameter(_full_precision(made.data.to(device)), made.requires_grad)
    for param in made.to(device).train(layer.training).parameters():
        param.data = _full_precision(param.data)
    return made


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def detach(layer: Any) -> None:
    """Removes all adapters from ``layer`` and gives it back the class it had before."""
    (kind,) = (mixin for mixin in layer.mixins if issubclass(mixin, AdapterLayer))
    for attribute in (*kind.adapter_layer_names, *kind.adapter_module_names, *_STATE):
        delattr(layer, attribute)
    remove_mixin(layer, kind)

"""PEFT: its tuners and wrappers, and the steps of injection that have no public name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel

# Public alternative: none. `peft.tuners` exports the tuners alone.
from peft.tuners.lora.layer import MultiheadAttention as MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner as BaseTuner
from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer
from peft.tuners.tuners_utils import check_target_module_exists as check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper as ModulesToSaveWrapper
from peft.utils.other import get_pattern_key as get_pattern_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers as convert_peft_config_for_transformers,
)
from peft.utils.transformers_weight_conversion import (
    get_model_conversion_mapping as get_model_conversion_mapping,
)
from torch import nn

# A field of LoraConfig by which classes of one's own are registered.
CUSTOM_MODULES_FIELD = "_custom_modules"


class LoraTuner(LoraModel):
    """PEFT's LoRA tuner with two of its steps given by functions.

    PEFT matches, creates and initialises inside of the constructor.

    Args:
        model: The module that gets adapters.
        config: What to add.
        adapter_name: The adapter's name.
        create: Called with PEFT's own function, the layer and its further arguments; returns the
            wrapper.
        place: Called with the layer and its wrapper, in place of replacing it in its parent.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str,
        create: Callable[[Callable[..., nn.Module], nn.Module, dict[str, Any]], nn.Module],
        place: Callable[[nn.Module, nn.Module], None],
    ) -> None:
        self._create, self._place = create, place
        super().__init__(model, config, adapter_name)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        self._place(child, new_module)

    def _create_new_module(  # type: ignore[override]
        self, lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        def original(layer: nn.Module) -> nn.Module:
            made: nn.Module = LoraModel._create_new_module(
                lora_config, adapter_name, layer, **kwargs
            )
            return made

        return self._create(original, target, kwargs)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezing is left to the caller."""


def cast_adapters(tuner: Any, adapter_name: str) -> None:
    """Makes the adapters of a tuner float32 where they are half precision, as PEFT does.

    Public alternative: ``autocast_adapter_dtype=True`` of ``get_peft_model``.
    """
    tuner._cast_adapter_dtype(adapter_name)


def enable_layer(layer: Any, enabled: bool) -> None:
    """Switches the adapters of one of PEFT's layers on or off.

    Public alternative: ``layer.enable_adapters``, which also rewrites ``requires_grad``, on which
    an optimizer may rely.
    """
    layer._disable_adapters = not enabled


def is_refused_target(part: nn.Module, leaf: str) -> bool:
    """Whether PEFT refuses layers called ``leaf`` in a model of this type."""
    check: Any = getattr(LoraModel, "_check_target_module_compatiblity", None)
    if check is None or not hasattr(part, "config"):
        return False
    try:
        check(None, LoraConfig(), part, leaf)
    except ValueError:
        return True
    return False

"""Private parts of PEFT: tuners, wrappers and injection steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from lightning_peft.compat.torch import compiled_late

# With bitsandbytes.
with compiled_late():
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig

from peft.tuners.lora import LoraModel

# Public alternative: none. `peft.tuners` exports the tuners alone.
from peft.tuners.lora.corda import CordaEigens as CordaEigens
from peft.tuners.lora.corda import collect_eigens_for_layer as collect_eigens_for_layer
from peft.tuners.lora.eva import get_eva_state_dict as get_eva_state_dict
from peft.tuners.lora.layer import Linear as Linear
from peft.tuners.lora.layer import MultiheadAttention as MultiheadAttention
from peft.tuners.lora.layer import ParamWrapper as ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer as TrainableTokensLayer
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

# A field of LoraConfig by which classes of one's own are registered.
CUSTOM_MODULES_FIELD = "_custom_modules"


class InPlaceTuner(BaseTuner):
    """One of PEFT's tuners with two of its steps given by functions.

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
        config: PeftConfig,
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

    def _create_new_module(
        self, config: PeftConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        create: Any = super()._create_new_module  # type: ignore[misc]
        return self._create(
            lambda layer: create(config, adapter_name, layer, **kwargs), target, kwargs
        )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezing is left to the caller."""


@cache
def in_place_tuner(peft_type: Any) -> type[InPlaceTuner]:
    """Returns PEFT's tuner of a method as an :class:`InPlaceTuner`."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    return type(f"InPlace{tuner.__name__}", (InPlaceTuner, tuner), {})


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

"""Base class of PEFT methods."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_peft.engine.layers.adapter import AdapterLayer


@dataclass(frozen=True)
class Method:
    """A method whose adapters live in PEFT's own wrappers.

    Attributes:
        peft_type: PEFT's name of it.
        targets: What `target_modules` has to name, where PEFT would choose other layers or none.
        dense_only: Whether it changes or copies weights, which codes of 4 or 8 bits are not.
        ignored_properties: What PEFT's code for convolutions leaves out; see
            :func:`lightning_peft.engine.selection.unsupported_layers.wrapping_problems`.
        decisive_fields: Fields of the config that decide what the tensors mean; ``None`` for all
            but those that say where adapters go.
        hides_model_type: Whether PEFT would choose other layers by the type of a model.
        projections: Random tensors that its layers share. PEFT draws them from a key in the config,
            so that neither checkpoints nor files hold them.
        from_trainer: Fields that PEFT needs, and a Trainer fills where they are left out.
        remark: A few words for the table of methods.
    """

    peft_type: str
    targets: str | None = None
    dense_only: bool = False
    ignored_properties: tuple[str, ...] = ()
    decisive_fields: tuple[str, ...] | None = None
    hides_model_type: bool = False
    projections: tuple[str, ...] = ()
    from_trainer: tuple[str, ...] = ()
    remark: str = ""

    def checked_config(self, config: Any) -> Any:
        """``config``, in PEFT's own spelling.

        Raises:
            ConfigError, UnsupportedError: With all settings that cannot work.
        """
        if self.projections and config.save_projection:
            config = copy.copy(config)
            config.save_projection = False
        return config

    def reason_for_trainer(self, config: Any) -> str | None:
        """Why its adapters need a Trainer with these settings, or ``None``."""
        return None

    def unsupported_reason(
        self, layer: nn.Module, name: str, config: Any, in_place: bool
    ) -> str | None:
        """Why ``layer``, which is called ``name``, cannot have an adapter, or ``None``."""
        return None

    def takes_experts(self, config: Any) -> bool:
        """Whether the word for all linear layers means weights of experts too."""
        return False

    def ranks(self, fields: Mapping[str, Any]) -> list[int]:
        """The ranks in a config: each is a dimension of a tensor in the adapter's file."""
        return []

    def label(self, fields: Mapping[str, Any]) -> str:
        """A few words for reports, from the config as primitives."""
        return self.peft_type


class InPlaceMethod(Method, ABC):
    """A method with a form on the adapted layers themselves, which PEFT's wrappers do not need.

    PEFT creates and initialises the adapters, and reads and writes their files;
    :meth:`layer_class` computes with them.
    """

    # Whether a layer may have several adapters at once, whose outputs add up.
    adds_up = False
    # Whether adapters start with numbers of the weight as it is stored.
    reads_base = False

    def is_in_place(self, config: Any) -> bool:
        """Whether it has that form with these settings; else PEFT's wrappers are used."""
        return True

    def limits_rows(self, config: Any) -> bool:
        """Whether its adapters can be for some rows of the output of a linear layer only."""
        return False

    @abstractmethod
    def layer_class(self, layer: nn.Module) -> type[AdapterLayer] | None:
        """The mixin for ``layer``; ``None`` where it has none, and PEFT's wrappers are used."""

    def create(
        self,
        original: Callable[[nn.Module], nn.Module],
        layer: nn.Module,
        name: str,
        config: Any,
        options: Mapping[str, Any],
    ) -> Any:
        """PEFT's layer around ``layer``, of which the adapter is taken."""
        return original(layer)

    def subtracts_from_base(self, config: Any) -> bool:
        """Whether the initialisation takes the first adapter off the base."""
        return False

    def for_plain_base(
        self, tensors: dict[str, Tensor], config: dict[str, Any], initial: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The same adapter for the base as it was before :meth:`subtracts_from_base`."""
        raise NotImplementedError

    def difference_in_peft(self, layer: nn.Module) -> str | None:
        """Why PEFT computes something else with the adapter on ``layer``, or ``None``."""
        return None

"""PEFT's model class as its tests use it, with this package behind it."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file
from torch import nn

import lightning_peft


class AdaptedModel(nn.Module):
    """A module with adapters of ``inject``, under the names of ``peft.PeftModel``.

    What has no counterpart in this package is not there: a test that needs it ends in an
    AttributeError with the name.
    """

    def __init__(self, model: nn.Module, config: Any = None, adapter_name: str = "default") -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config: dict[str, Any] = {}
        self.active_adapter = adapter_name
        if config is not None:
            self.add_adapter(adapter_name, config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        **_: Any,
    ) -> AdaptedModel:
        """Loads a folder onto ``model``."""
        loaded = cls(model, adapter_name=adapter_name)
        loaded.load_adapter(model_id, adapter_name, is_trainable)
        return loaded

    def __getattr__(self, name: str) -> Any:
        """Offers what the module has, as PEFT's class does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    @property
    def model(self) -> nn.Module:
        """The module with adapters."""
        inner: Any = self.base_model.model
        return inner

    @property
    def prefix(self) -> Any:
        """How PEFT names the parameters of the method."""
        return PEFT_TYPE_TO_PREFIX_MAPPING[self.active_peft_config.peft_type]

    @property
    def active_peft_config(self) -> Any:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return [self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self.model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """Returns the module with adapters."""
        return self.model

    def add_adapter(self, adapter_name: str, peft_config: Any, **_: Any) -> None:
        """Adds one adapter; all else is frozen, heads too, as PEFT does it."""
        if not self.peft_config:
            self.model.requires_grad_(False)
        lightning_peft.inject(self.model, peft_config, adapter_name=adapter_name)
        self.peft_config[adapter_name] = peft_config

    def set_adapter(self, adapter_name: str, **_: Any) -> None:
        """Makes one adapter the active one."""
        lightning_peft.set_adapter(self.model, adapter_name)
        self.active_adapter = adapter_name

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Switches the adapters off inside of a ``with`` block."""
        return lightning_peft.disable_adapters(self.model)

    def merge_adapter(self, *_: Any, **__: Any) -> None:
        """Merges the active adapter."""
        lightning_peft.merge(self.model)

    def unmerge_adapter(self) -> None:
        """Takes it out of the weights again."""
        lightning_peft.unmerge(self.model)

    def merge_and_unload(self, *_: Any, **__: Any) -> nn.Module:
        """Returns the module with the adapter built in."""
        lightning_peft.merge(self.model)
        return lightning_peft.unload(self.model)

    def unload(self) -> nn.Module:
        """Returns the module without adapters."""
        return lightning_peft.unload(self.model)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: list[str] | None = None,
        **_: Any,
    ) -> None:
        """Writes adapters where PEFT writes them: one called otherwise in a folder of its name."""
        for name in selected_adapters or self.peft_config:
            folder = Path(save_directory, "" if name == "default" else name)
            lightning_peft.save_adapter(self.model, folder, adapter_name=name)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        **_: Any,
    ) -> SimpleNamespace:
        """Loads a folder as a further adapter, which does not become the active one."""
        active, others = self.active_adapter, bool(self.peft_config)
        if not others:
            self.model.requires_grad_(False)
        lightning_peft.load_adapter(
            self.model, model_id, adapter_name=adapter_name, is_trainable=is_trainable
        )
        self.peft_config[adapter_name] = peft.PeftConfig.from_pretrained(str(model_id))
        if others:
            self.set_adapter(active)
        if not is_trainable:
            self.eval()
        # Anything else is an error.
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def adapter_state_dict(self, adapter_name: str = "default", **_: Any) -> dict[str, Any]:
        """Returns the tensors of one adapter by the keys of PEFT's files."""
        with tempfile.TemporaryDirectory() as folder:
            lightning_peft.save_adapter(self.model, folder, adapter_name=adapter_name)
            return load_file(Path(folder, "adapter_model.safetensors"))

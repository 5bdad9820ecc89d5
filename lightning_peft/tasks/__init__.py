"""LightningModules and callbacks of the recipes, independent of adapters."""

from lightning_peft.exports import attach_stub
from lightning_peft.plugin.namespace import bind_if_unambiguous

__getattr__, __dir__, __all__ = attach_stub(__name__, bind=bind_if_unambiguous)

"""LoRA and QLoRA for any LightningModule, in one argument: ``Trainer(strategy=QLoRAStrategy())``.

Importing this package is cheap: its parts load on first use. The names ``"lora"`` and ``"qlora"``
are registered with Lightning as soon as Lightning is imported.
"""

from lightning_peft.exports import attach_stub
from lightning_peft.plugin.namespace import bind_if_unambiguous, register

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach_stub(
    __name__, bind=bind_if_unambiguous, bound=("plugin.callbacks", "data.")
)

register()

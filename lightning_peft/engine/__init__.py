"""The engine: LoRA and QLoRA for any ``torch.nn.Module``, on torch, PEFT and bitsandbytes.

Names load on first use, since PEFT and bitsandbytes take seconds to import.
"""

from lightning_peft.exports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__)

"""The engine: torch, PEFT and bitsandbytes; it works on any ``torch.nn.Module``.

Names load on first use, since PEFT and bitsandbytes take seconds to import.
"""

from lightning_peft.exports import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__)

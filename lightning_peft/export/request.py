"""Export requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base


@dataclass
class ExportRequest:
    """Arguments common to all formats.

    Attributes:
        base_name: What the base is called in exported files, instead of what is recorded.
        options: Arguments of :func:`lightning_peft.export.merging.merge`.
        bits: Of a quantized model.
        chat_template: Jinja source, where one is known.
        system: System turn for Ollama.
        separate_adapter: Keep base and adapter apart, for Ollama and GGUF.
        adapter_only: Write the adapter without its base, for GGUF.
        outtype: llama.cpp's name of the kind of numbers, for GGUF; by default f16, and f32 of an
            adapter alone.
        llama_quantize: llama.cpp's program for kinds that are not written here.
    """

    adapter: Adapter
    base: Base
    output: Path
    base_name: str | None
    options: dict[str, Any]
    bits: int = 8
    chat_template: str | None = None
    system: str | None = None
    separate_adapter: bool = False
    adapter_only: bool = False
    outtype: str | None = None
    llama_quantize: str | None = None

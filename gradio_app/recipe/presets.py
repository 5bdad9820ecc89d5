"""Presets of the form: models, training lengths and GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gradio_app.runs.machine import this_machine
from gradio_app.settings import has_zero_gpu
from lightning_peft.demo.real_base import SMOLLM2_PLACE

DEMO_BASE = "package:demo/base"
_SHAPES = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Model:
    """A base that is offered for families of tasks, by its name on the hub or in the package.

    The licence is called as its authors do. Access to gated ones must first be requested.
    ``stored`` is how many parameters the files on the hub have, where that differs.
    """

    name: str
    parameters: int
    licence: str
    families: tuple[str, ...]
    gated: bool = False
    bytes_per_parameter: int = 2
    stored: int | None = None

    @property
    def title(self) -> str:
        """The name as people see it: of a file of another package, that of the file."""
        return self.name.rpartition("/")[2] if self.name == SMOLLM2_PLACE else self.name

    @property
    def download_bytes(self) -> int:
        """Bytes that are fetched from the hub; what is not weights is little."""
        return self.bytes_per_parameter * (self.stored or self.parameters)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the 16-bit weights."""
        return 2 * self.parameters

    @property
    def shape(self) -> Path | None:
        """A folder whose ``config.json`` has its sizes: it is planned before a download."""
        folder = _SHAPES / self.name.rpartition("/")[2]
        return folder if folder.is_dir() else None

    @property
    def memory(self) -> tuple[float, float] | None:
        """GB that LoRA and QLoRA need at least on this machine; ``None`` if not known."""
        found = memory_needs().get(self.name)
        if found is None:
            return None
        lora, qlora = found["gpu" if has_zero_gpu() or this_machine().gpu else "cpu"]
        return lora, qlora


@cache
def memory_needs() -> dict[str, dict[str, list[float]]]:
    """Returns the planner's GB, kept as it takes seconds for each model.

    They are for a row of 512 tokens, rank 16 and checkpointed activations.
    """
    found: dict[str, dict[str, list[float]]] = json.loads((_SHAPES / "memory.json").read_text())
    return found


def _other(name: str, parameters: int, family: str) -> Model:
    """Returns a base for other tasks than chat, whose files on the hub are in 32 bits."""
    return Model(name, parameters, "Apache 2.0", (family,), False, 4)


_CHAT = ("causal-lm",)
MODELS = (
    Model(SMOLLM2_PLACE, 134_515_008, "Apache 2.0", _CHAT),
    Model(DEMO_BASE, 4_262_144, "Apache 2.0", ("causal-lm", "encoder")),
    Model("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, "Apache 2.0", _CHAT),
    Model("google/gemma-3-270m-it", 268_098_176, "Gemma", _CHAT, gated=True),
    Model("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, "Apache 2.0", _CHAT),
    # Their files have the tied head of the two smallest a second time.
    Model("Qwen/Qwen3-0.6B", 596_049_920, "Apache 2.0", _CHAT, stored=751_632_384),
    Model("google/gemma-3-1b-it", 999_885_952, "Gemma", _CHAT, gated=True),
    Model("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2", _CHAT, gated=True),
    Model("Qwen/Qwen3-1.7B", 1_720_574_976, "Apache 2.0", _CHAT, stored=2_031_739_904),
    Model("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, "Apache 2.0", _CHAT),
    Model("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "Llama 3.2", _CHAT, gated=True),
    Model("microsoft/Phi-4-mini-instruct", 3_836_021_760, "MIT", _CHAT),
    Model("Qwen/Qwen3-4B", 4_022_468_096, "Apache 2.0", _CHAT),
    Model("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, "Apache 2.0", _CHAT, gated=True),
    Model("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "Llama 3.1", _CHAT, gated=True),
    _other("answerdotai/ModernBERT-base", 149_014_272, "encoder"),
    _other("google-t5/t5-small", 60_506_624, "seq2seq"),
    _other("google/flan-t5-base", 247_577_856, "seq2seq"),
    _other("openai/whisper-tiny", 37_760_640, "speech"),
    _other("openai/whisper-small", 241_734_912, "speech"),
    _other("facebook/dinov2-small", 22_056_576, "image"),
    Model("HuggingFaceTB/SmolVLM-256M-Instruct", 256_484_928, "Apache 2.0", ("image-text",)),
)

# How long and how strongly: epochs, rank, and what the learning rate of the recipe is taken by.
AMOUNTS: dict[str, tuple[int, int, float]] = {
    "quick": (1, 8, 1.0),
    "balanced": (2, 16, 1.0),
    "thorough": (4, 32, 0.5),
}
# GPUs by the planner's names; what others have is given as an amount.
GPUS = (
    *("t4", "l4", "a10g", "a100-40", "a100-80", "h100", "h200"),
    *("rtx3060", "rtx3080", "rtx3090", "rtx4060", "rtx4070", "rtx4080", "rtx4090"),
    *("rtx5070", "rtx5080", "rtx5090", "rtxa6000"),
)
THIS_MACHINE = "this"

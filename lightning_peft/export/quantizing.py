"""Post-training quantization of merged models with bitsandbytes.

bitsandbytes is what the base is quantized with in training, so it is installed; it runs on CPUs
too, needs no calibration data, and transformers and vLLM load the folders without this package.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_peft import engine
from lightning_peft.engine.backends.registry import storage_bytes
from lightning_peft.engine.layers.expert_weights import expert_parameters
from lightning_peft.errors import ConfigError
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import INDEX, Base
from lightning_peft.export.measuring import LogitError, measured_model
from lightning_peft.export.merged_folder import REPORT
from lightning_peft.export.output import copy_companions


def quantize_folder(merged: Path, output: Path, bits: int) -> tuple[str, int]:
    """Writes a merged model with its linear layers in 8 or 4 bits.

    Returns:
        Their kind, in words, and the bytes of weights of experts. Those are not linear layers, and
        transformers writes and reads them in 16 or 32 bits.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits}: 8 or 4.")
    settings = engine.quantization_config(load_in_8bit=bits == 8, bnb_4bit_compute_dtype="bfloat16")
    where = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model: Any = _class_of(merged).from_pretrained(
        merged, quantization_config=settings, dtype="auto", device_map={"": where}
    )
    # Before any forward pass: on some CPUs that repacks the codes.
    model.save_pretrained(output)
    copy_companions(merged, output, (INDEX, "config.json"))
    assert (output / REPORT).is_file()
    backend = engine.backend_for(settings)
    experts = sum(
        storage_bytes(child.get_parameter(name))
        for child in model.modules()
        for name in expert_parameters(child)
    )
    return backend.label(backend.config_to_dict(settings)), experts


def _class_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(transformers, config["architectures"][0])


def measure_quantized(
    adapter: Adapter, base: Base, folder: Path, options: dict[str, Any]
) -> tuple[LogitError | None, str | None]:
    """Returns how far a quantized folder is from the model as it was trained, or why not."""
    load = partial(_class_of(folder).from_pretrained, folder, dtype=torch.float32)
    return measured_model(adapter, base, load, options)

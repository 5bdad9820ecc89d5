"""Registry of export formats."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import UnsupportedError
from lightning_peft.export.adapter_folder import copy_adapter, notes_on_base
from lightning_peft.export.card import dense_experts, quantized_section
from lightning_peft.export.gguf.exporting import as_gguf
from lightning_peft.export.gguf.llama_programs import converter_command
from lightning_peft.export.loading import writes_text
from lightning_peft.export.merging import merge
from lightning_peft.export.modelfile import as_ollama
from lightning_peft.export.output import atomic_folder, write_json
from lightning_peft.export.quantizing import measure_quantized, quantize_folder
from lightning_peft.export.request import ExportRequest
from lightning_peft.export.sentence_models import as_sentence_transformers

# The ranks that vLLM lays out memory for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def as_adapter(request: ExportRequest) -> dict[str, Any]:
    """Exports the adapter in PEFT's format, with a model card."""
    with atomic_folder(request.output) as folder:
        copy_adapter(request, folder)
    return {"notes": notes_on_base(request), "commands": []}


def as_merged(request: ExportRequest) -> dict[str, Any]:
    """Exports the merged model."""
    report = merge(request.adapter, request.output, **request.options)
    return {
        "notes": [],
        "commands": _external_quantization_commands(request.output),
        "merge": report,
    }


def as_quantized(request: ExportRequest) -> dict[str, Any]:
    """Exports the merged model, quantized by bitsandbytes."""
    with atomic_folder(request.output) as folder:
        merged = folder / "merged"
        report = merge(request.adapter, merged, **request.options)
        kind, experts = quantize_folder(merged, folder, request.bits)
        error, reason = measure_quantized(request.adapter, request.base, folder, request.options)
        shutil.rmtree(merged)
        record = {
            "bits": request.bits,
            "kind": kind,
            "dense_expert_bytes": experts,
            "logit_error": asdict(error) if error else None,
            "not_measured": reason,
        }
        write_json(folder / "quantization_report.json", record)
        with open(folder / "README.md", "a", encoding="utf-8") as card:
            card.write(quantized_section(record))
    report["output"] = str(request.output)
    name = request.adapter.base.get("class")
    commands = [f"vllm serve {_quoted(request.output)}"] if not name or writes_text(name) else []
    notes = [dense_experts(experts)] if experts else []
    return {"notes": notes, "commands": commands, "merge": report, "quantized": record}


def as_vllm(request: ExportRequest) -> dict[str, Any]:
    """Exports the adapter with the command by which vLLM serves it, if it does."""
    name = request.adapter.base.get("class")
    if name and not writes_text(name):
        raise UnsupportedError(
            f"The adapter was trained on a {name}, and vLLM serves language models, with or "
            "without images, to adapters. Export it with --format adapter, or merged."
        )
    config = request.adapter.config
    full = [name for name in ("modules_to_save", "use_dora") if config.get(name)]
    full += ["bias"] if config.get("bias") not in (None, "none") else []
    full += ["weights that adapters were merged into"] if request.adapter.merged_layers else []
    if full:
        raise UnsupportedError(
            f"The adapter has {', '.join(full)}, and vLLM takes low-rank factors "
            "alone. Export it with --format merged, and serve that folder."
        )
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    rank = next((size for size in _VLLM_RANKS if size >= max(ranks)), None)
    if rank is None:
        raise UnsupportedError(
            f"The adapter has rank {max(ranks)}, and vLLM takes at most {_VLLM_RANKS[-1]}. Export "
            "it with --format merged, and serve that folder."
        )
    with atomic_folder(request.output) as folder:
        copy_adapter(request, folder)
    base = request.base_name or request.base.name
    serve = (
        f"vllm serve {_quoted(base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {_quoted(f'{request.adapter.name}={request.output}')}"
    )
    notes, commands = notes_on_base(request), [serve]
    settings = request.adapter.quantization
    backend = None if settings is None else engine.backend_for(settings)
    if backend is not None and backend.vllm_quantization is not None:
        commands.append(f"{serve} --quantization {backend.vllm_quantization}")
        notes.append(
            f"the adapter was trained on a {backend.bits}-bit base: the first command serves it on "
            f"16 bits, the second on vLLM's own {backend.bits} bits, and --format merged gives the "
            "function in training"
        )
    return {"notes": notes, "commands": commands}


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _external_quantization_commands(folder: Path) -> list[str]:
    """Returns how other libraries quantize a merged folder, where the hardware is."""
    source, into = json.dumps(str(folder)), f"{folder}-gptq"
    gptq = (
        "from gptqmodel import GPTQModel, QuantizeConfig; from datasets import load_dataset; "
        'rows = load_dataset("allenai/c4", data_files="en/c4-train.00001-of-01024.json.gz", '
        'split="train").select(range(256))["text"]; '
        f"model = GPTQModel.load({source}, QuantizeConfig(bits=4, group_size=128)); "
        f"model.quantize(rows); model.save({json.dumps(into)})"
    )
    awq = (
        "from llmcompressor import oneshot; from llmcompressor.modifiers.awq import AWQModifier; "
        f'oneshot(model={source}, dataset="open_platypus", recipe=[AWQModifier('
        'targets=["Linear"], scheme="W4A16_ASYM", ignore=["lm_head"])], '
        f"output_dir={json.dumps(f'{folder}-awq')}, max_seq_length=512, "
        "num_calibration_samples=256)"
    )
    return [
        f"pip install gptqmodel && python -c {_quoted(gptq)}",
        f"pip install llmcompressor && python -c {_quoted(awq)}",
        converter_command(folder),
    ]


FORMATS = {
    "adapter": as_adapter,
    "merged": as_merged,
    "quantized": as_quantized,
    "gguf": as_gguf,
    "ollama": as_ollama,
    "sentence-transformers": as_sentence_transformers,
    "vllm": as_vllm,
}

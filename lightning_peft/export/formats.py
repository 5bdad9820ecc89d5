"""A finished adapter in the forms in which others take it."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.export.adapters import CONFIG, PROVENANCE, WEIGHTS
from lightning_peft.export.base import license_of
from lightning_peft.export.card import adapter_card, public, quantized_section
from lightning_peft.export.gguf.exporting import as_gguf
from lightning_peft.export.go_template import translate
from lightning_peft.export.loading import load_tokenizer
from lightning_peft.export.merging import merge
from lightning_peft.export.output import atomic_folder
from lightning_peft.export.quantizing import measure_quantized, quantize_folder
from lightning_peft.export.request import ExportRequest

# The ranks that vLLM lays out memory for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Architectures that Ollama's documentation lists for safetensors.
_OLLAMA = ("Llama", "Mistral", "Gemma", "Phi3")


def as_adapter(request: ExportRequest) -> dict[str, Any]:
    """Exports the adapter in PEFT's format, with a model card."""
    with atomic_folder(request.output) as folder:
        _copy_adapter(request, folder)
    return {"notes": _notes_on_base(request), "commands": []}


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
        kind = quantize_folder(merged, folder, request.bits)
        error, reason = measure_quantized(request.adapter, request.base, folder, request.options)
        shutil.rmtree(merged)
        record = {
            "bits": request.bits,
            "kind": kind,
            "logit_error": asdict(error) if error else None,
            "not_measured": reason,
        }
        text = json.dumps(record, indent=2) + "\n"
        (folder / "quantization_report.json").write_text(text, encoding="utf-8")
        with open(folder / "README.md", "a", encoding="utf-8") as card:
            card.write(quantized_section(record))
    report["output"] = str(request.output)
    commands = [f"vllm serve {_quoted(request.output)}"]
    return {"notes": [], "commands": commands, "merge": report, "quantized": record}


def as_vllm(request: ExportRequest) -> dict[str, Any]:
    """Exports the adapter with the command by which vLLM serves it.

    Raises:
        UnsupportedError: If vLLM does not take such an adapter.
    """
    config = request.adapter.config
    full = [name for name in ("modules_to_save", "use_dora") if config.get(name)]
    biased = ["bias"] if config.get("bias") not in (None, "none") else []
    if full or biased:
        raise UnsupportedError(
            f"The adapter has {', '.join([*full, *biased])}, and vLLM takes low-rank factors "
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
        _copy_adapter(request, folder)
    base = request.base_name or request.base.name
    serve = (
        f"vllm serve {_quoted(base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {_quoted(f'{request.adapter.name}={request.output}')}"
    )
    notes, commands = _notes_on_base(request), [serve]
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


def as_ollama(request: ExportRequest) -> dict[str, Any]:
    """Exports a folder with a Modelfile, and the merged model or the adapter."""
    notes, report = [], None
    architecture = str((request.base.config.architectures or [""])[0])
    if not architecture.startswith(_OLLAMA):
        notes.append(
            f"{architecture} is not among the architectures that Ollama documents for safetensors "
            f"({', '.join(_OLLAMA)}): if `ollama create` refuses it, convert the model to GGUF "
            "first (see the commands)"
        )
    with atomic_folder(request.output) as folder:
        if request.separate_adapter:
            _copy_adapter(request, folder / "adapter")
            source = (
                f"FROM {request.base_name or request.base.folder.resolve()}\nADAPTER ./adapter\n"
            )
            notes += _notes_on_base(request)
        else:
            report = merge(request.adapter, folder / "model", **request.options)
            source = "FROM ./model\n"
        text, more = _modelfile(request, source)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    name = request.adapter.name.lower()
    commands = [
        f"cd {_quoted(request.output)} && ollama create {_quoted(name)} -f Modelfile",
        f"ollama run {_quoted(name)}",
    ]
    if report is not None:
        report["output"] = str(request.output / "model")
        commands.append(_gguf(request.output / "model"))
    result = {"notes": [*notes, *more], "commands": commands}
    return result | ({"merge": report} if report else {})


def _modelfile(request: ExportRequest, source: str) -> tuple[str, list[str]]:
    tokenizer, notes = load_tokenizer(request.base), []
    template = request.chat_template or getattr(tokenizer, "chat_template", None)
    turns = translate(tokenizer, template) if template else None
    text = source
    ends = [tokenizer.eos_token]
    if turns is not None:
        bos = _added_token(tokenizer)
        text += f'TEMPLATE """{turns.as_go(bos)}"""\n'
        ends.append(turns.end)
        if turns.as_go(bos) != turns.as_go(None):
            notes.append(f"{bos!r} is left out of TEMPLATE: Ollama begins with it")
    elif template:
        notes.append(
            "not ready: the chat template does more than put text around turns, and was not "
            "translated. Write TEMPLATE in the Modelfile by hand, or Ollama sends prompts as they "
            "are"
        )
    else:
        notes.append(
            "not ready: no chat template is known (--chat-template gives one), so Ollama sends "
            "prompts as they are"
        )
    for end in dict.fromkeys(filter(None, ends)):
        text += f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}\n"
    if request.system:
        if '"""' in request.system:
            raise ConfigError(
                'The system turn holds """, which ends a text in a Modelfile. Write it without.'
            )
        text += f'SYSTEM """{request.system}"""\n'
    return text, notes


def _added_token(tokenizer: Any) -> str | None:
    """Returns the token that the tokenizer, and so Ollama, puts before every text.

    SmolLM2 and Qwen have one that is put there by the template alone, or nowhere.
    """
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else None


def _copy_adapter(request: ExportRequest, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    adapter = request.adapter
    # A folder whose weights are missing or damaged is of no use to others.
    engine.read_adapter(adapter.folder)
    shutil.copyfile(adapter.folder / WEIGHTS, folder / WEIGHTS)
    config, facts = dict(adapter.config), dict(adapter.facts)
    if request.base_name:
        config["base_model_name_or_path"] = request.base_name
        if adapter.base:
            facts["base"] = adapter.base | {"name_or_path": request.base_name}
    if facts.get("data"):
        # The folder travels, and the data stays where it was.
        facts["data"] = public(facts["data"])
    adapter = replace(adapter, config=config, facts=facts)
    for name, fields in ((CONFIG, config), (PROVENANCE, facts)):
        if fields:
            text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
    card = adapter_card(adapter, license_of(request.base.folder))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if request.chat_template:
        (folder / "chat_template.jinja").write_text(request.chat_template, encoding="utf-8")


def _notes_on_base(request: ExportRequest) -> list[str]:
    named = request.base_name or request.adapter.base_name
    # A mark, such as of the shipped base, stands for a folder too.
    if not named or not (Path(named).is_absolute() or ":" in named):
        return []
    return [
        f"the files name the base as a folder of this machine ({named}): give the name that "
        "others know it by with --base-name"
    ]


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _gguf(folder: Path) -> str:
    return (
        f"python llama.cpp/convert_hf_to_gguf.py {_quoted(folder)} "
        f"--outfile {_quoted(f'{folder}-q8_0.gguf')} --outtype q8_0"
    )


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
        _gguf(folder),
    ]


FORMATS = {
    "adapter": as_adapter,
    "merged": as_merged,
    "quantized": as_quantized,
    "gguf": as_gguf,
    "ollama": as_ollama,
    "vllm": as_vllm,
}

"""Export for Ollama: a Modelfile with its model."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_peft.errors import ConfigError, UnsupportedError, first_line
from lightning_peft.export.adapter_folder import copy_adapter, notes_on_base
from lightning_peft.export.gguf.exporting import GgufExport
from lightning_peft.export.gguf.files import has_gguf, require_gguf
from lightning_peft.export.gguf.llama_programs import converter_command
from lightning_peft.export.go_template import translate
from lightning_peft.export.loading import load_tokenizer
from lightning_peft.export.merging import merge
from lightning_peft.export.output import atomic_folder, check_output_free
from lightning_peft.export.request import ExportRequest

# Architectures that Ollama's documentation lists for safetensors.
_OLLAMA = ("Llama", "Mistral", "Gemma", "Phi3")
# What GGUF calls the dtypes of a merged model.
_OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def as_ollama(request: ExportRequest) -> dict[str, Any]:
    """Exports a folder with a Modelfile, and the merged model, or base and adapter.

    The model is a GGUF file where one can be written, and a folder of safetensors elsewhere, which
    Ollama converts.
    """
    check_output_free(request.output)
    lines, notes = _lines(request)
    export, reasons = _gguf_export(request)
    with atomic_folder(request.output) as folder:
        report = _safetensors(request, folder) if export is None else _gguf(export, folder)
        text = report.pop("source") + lines
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    if request.separate_adapter:
        notes += notes_on_base(request)
    name = shlex.quote(request.adapter.name.lower())
    commands = [
        f"cd {shlex.quote(str(request.output))} && ollama create {name} -f Modelfile",
        f"ollama run {name}",
        *report.pop("commands"),
    ]
    return {"notes": [*reasons, *report.pop("notes"), *notes], "commands": commands, **report}


def _gguf_export(request: ExportRequest) -> tuple[GgufExport | None, list[str]]:
    """Returns the export of the GGUF file, or ``None`` and why there is none."""
    why = "the model is a folder of safetensors, which Ollama converts, not a GGUF file"
    # The numbers of a GGUF file were asked for.
    wanted = bool(request.outtype or request.llama_quantize)
    if wanted:
        require_gguf()
    elif not has_gguf():
        return None, [f"{why}: pip install 'lightning-peft[gguf]'"]
    # A base that Ollama knows by a name is not written.
    alone = request.separate_adapter and request.base_name is not None
    options, outtype = request.options, request.outtype
    if options.get("dtype") and not wanted:
        outtype = _OUTTYPES[options["dtype"]]
        options = options | {"dtype": None}
    try:
        made = replace(request, adapter_only=alone, options=options, outtype=outtype)
        return GgufExport(made), []
    except UnsupportedError as error:
        if wanted:
            raise
        return None, [f"{why}: {first_line(error)}"]


def _gguf(export: GgufExport, folder: Path) -> dict[str, Any]:
    files, report = export.run(folder)
    model = files.get("model") or files.get("base")
    source = f"FROM {f'./{model.name}' if model else export.request.base_name}\n"
    if "adapter" in files:
        source += f"ADAPTER ./{files['adapter'].name}\n"
    return report | {"source": source, "commands": []}


def _safetensors(request: ExportRequest, folder: Path) -> dict[str, Any]:
    architecture, notes = str((request.base.config.architectures or [""])[0]), []
    if not architecture.startswith(_OLLAMA):
        notes.append(
            f"{architecture} is not among the architectures that Ollama documents for safetensors "
            f"({', '.join(_OLLAMA)}): if `ollama create` refuses it, convert the model to GGUF "
            "first (see the commands)"
        )
    if request.separate_adapter:
        copy_adapter(request, folder / "adapter")
        gguf = request.base.gguf
        place = request.base.folder.resolve() if gguf is None else gguf.file
        base = request.base_name or place
        source = f"FROM {base}\nADAPTER ./adapter\n"
        return {"source": source, "notes": notes, "commands": []}
    report = merge(request.adapter, folder / "model", **request.options)
    model = request.output / "model"
    return {
        "source": "FROM ./model\n",
        "notes": notes,
        "commands": [converter_command(model)],
        "merge": report | {"output": str(model)},
    }


def _lines(request: ExportRequest) -> tuple[str, list[str]]:
    """Returns the lines of a Modelfile on conversations, and notes for the user."""
    tokenizer, text = load_tokenizer(request.base), ""
    notes: list[str] = []
    template = request.chat_template or getattr(tokenizer, "chat_template", None)
    turns = translate(tokenizer, template) if template else None
    ends = [tokenizer.eos_token]
    if turns is not None:
        bos = added_token(tokenizer)
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


def added_token(tokenizer: Any) -> str | None:
    """Returns the token that the tokenizer, and so Ollama, puts before every text.

    SmolLM2 and Qwen have one that is put there by the template alone, or nowhere.
    """
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else None

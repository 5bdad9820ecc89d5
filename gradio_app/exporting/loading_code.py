"""Python that loads an export where only the usual libraries are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradio_app.exporting.export import Export
from gradio_app.exporting.sizes import base_of
from gradio_app.running.reading import json_object

_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
}


def loading_code(export: Export, checkpoint: Path) -> str:
    """Returns the code for an export; empty where there is none to write.

    Args:
        export: The export.
        checkpoint: Folder of the adapter that was exported.
    """
    place = export.wish.push_to if export.state == "pushed" else export.run_name
    facts = json_object(checkpoint / "provenance.json")
    if export.wish.format == "ollama":
        return ""
    auto = _auto(facts)
    if export.wish.format in ("merged", "quantized"):
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"model = {auto}.from_pretrained({place!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({place!r})",
        ]
        return "\n".join(lines)
    base, revision = base_of(checkpoint)
    return "\n".join(
        _with_peft(place, export.wish.base_name or base, revision, auto, facts.get("quantization"))
    )


def _with_peft(
    place: str, base: str, revision: str | None, auto: str, quantization: object
) -> list[str]:
    settings = _settings(quantization)
    names = ["AutoTokenizer", auto, *(["BitsAndBytesConfig"] if settings else [])]
    given = repr(base) + (f", revision={revision!r}" if revision else "")
    more = ", quantization_config=settings" if settings else ""
    lines = ["from peft import PeftModel", f"from transformers import {', '.join(sorted(names))}"]
    lines.append("")
    if settings:
        lines += ["# The adapter was trained on the base in fewer bits.", settings]
    return [
        *lines,
        f"base = {auto}.from_pretrained({given}{more})",
        f"model = PeftModel.from_pretrained(base, {place!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({given})",
    ]


def _auto(facts: dict[str, Any]) -> str:
    base = facts.get("base")
    name = str(base.get("class", "")) if isinstance(base, dict) else ""
    return next((auto for end, auto in _AUTO.items() if name.endswith(end)), "AutoModel")


def _settings(quantization: object) -> str:
    if not isinstance(quantization, dict):
        return ""
    plain = {
        name: value
        for name, value in quantization.items()
        if isinstance(value, (str, bool, int, float)) and name.isidentifier()
    }
    if not plain:
        return ""
    given = "".join(f"    {name}={value!r},\n" for name, value in sorted(plain.items()))
    return f"settings = BitsAndBytesConfig(\n{given})"

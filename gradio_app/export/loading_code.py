"""Python that loads an export where only the usual libraries are installed."""

from __future__ import annotations

from pathlib import Path

from gradio_app.export.base_size import recorded_base
from gradio_app.export.record import Export
from gradio_app.runs.files import read_json_object
from lightning_peft.export.loading_code import adapter_code, labels_of, merged_model_code


def loading_code(export: Export, checkpoint: Path) -> str:
    """Returns the code for an export; empty where there is none to write."""
    place = (export.request.push_to if export.state == "pushed" else None) or export.run_name
    facts = read_json_object(checkpoint / "provenance.json")
    if export.request.format == "ollama":
        return ""
    if export.request.format in ("merged", "quantized"):
        return merged_model_code(facts, place)
    base, revision = recorded_base(checkpoint)
    name = export.request.base_name or base
    labels = labels_of(checkpoint)
    return adapter_code(facts, place, name, revision, labels)

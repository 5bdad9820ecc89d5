"""Python that loads an export where only the usual libraries are installed."""

from __future__ import annotations

from pathlib import Path

from gradio_app.exporting.export import Export
from gradio_app.exporting.sizes import base_of
from gradio_app.running.reading import json_object
from lightning_peft.export.loading_code import adapter_code, labels_of, whole_code


def loading_code(export: Export, checkpoint: Path) -> str:
    """Returns the code for an export; empty where there is none to write.

    Args:
        export: The export.
        checkpoint: Folder of the adapter that was exported.
    """
    place = (export.wish.push_to if export.state == "pushed" else None) or export.run_name
    facts = json_object(checkpoint / "provenance.json")
    if export.wish.format == "ollama":
        return ""
    if export.wish.format in ("merged", "quantized"):
        return whole_code(facts, place)
    base, revision = base_of(checkpoint)
    name = export.wish.base_name or base
    labels = labels_of(checkpoint)
    return adapter_code(facts, place, name, revision, labels)

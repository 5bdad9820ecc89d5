"""Export of an adapter in PEFT's format."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from lightning_peft import engine
from lightning_peft.export.adapters import CONFIG, PROVENANCE
from lightning_peft.export.base import license_of
from lightning_peft.export.card import adapter_card, public
from lightning_peft.export.loading_code import WEIGHTS
from lightning_peft.export.output import write_json
from lightning_peft.export.request import ExportRequest
from lightning_peft.model_reference import written_reference


def copy_adapter(request: ExportRequest, folder: Path) -> None:
    """Writes the adapter, its record and a model card into a folder."""
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
            write_json(folder / name, fields, sort_keys=True)
    card = adapter_card(adapter, license_of(request.base.folder))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if request.chat_template:
        (folder / "chat_template.jinja").write_text(request.chat_template, encoding="utf-8")


def notes_on_base(request: ExportRequest) -> list[str]:
    """Returns that others do not have the folder of the base, where it is one."""
    named = request.base_name or request.adapter.base_name
    if not named or not _is_of_this_machine(named):
        return []
    return [
        f"the files name the base as a folder or file of this machine ({named}): give the name "
        "that others know it by with --base-name"
    ]


def _is_of_this_machine(named: str) -> bool:
    reference = written_reference(named)
    place, file = Path(reference.place), reference.gguf_file
    if place.is_absolute() or place.is_dir():
        return True
    if file is None:
        # A mark, such as of the shipped base, stands for a folder too.
        return ":" in named
    # A file of a repository is named as in org/name:model.gguf.
    return named != f"{reference.place}:{file}"

"""Record of an export on disk: request, progress and result."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.export.base_size import recorded_base
from gradio_app.export.request import GGUF_ADAPTER, GGUF_FORMATS, SENTENCES, ExportRequest
from gradio_app.guards import shortened
from gradio_app.runs.failures import classify_error
from gradio_app.runs.files import read_json_object, tail
from lightning_peft.export.loading_code import (
    adapter_code,
    merged_model_code,
    sentence_class,
    sentence_code,
)

# Folder of all exports of a run, and what is in the folder of one.
FOLDER = "exports"
REQUEST_FILE, RESULT_FILE, LOG_FILE, OUTPUT = "export.json", "result.json", "log", "output"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
_PROGRESS = re.compile(r"(?P<what>[^\n:]{1,60}): (?P<percent>\d{1,3})%")
_MESSAGE_PREFIX = "lightning-peft: "


@dataclass(frozen=True)
class Export:
    """One export as it is at a moment, in a folder that is named by the server.

    Its state is ``"going"``, ``"cancelling"``, ``"cancelled"``, ``"failed"``, ``"finished"``,
    ``"asks"`` (whether what it lists is to be pushed), or ``"pushed"``. The result is what the
    command printed.
    """

    name: str
    folder: Path
    run_name: str
    request: ExportRequest
    created: float
    state: str
    result: dict[str, Any]

    @property
    def active(self) -> bool:
        """Whether its process is there."""
        return self.state in ("going", "cancelling")

    @property
    def output(self) -> Path:
        """The folder that was made."""
        return self.folder / OUTPUT

    @property
    def is_complete(self) -> bool:
        """Whether the folder is there: a push can fail after it."""
        return not self.active and self.output.is_dir()

    @property
    def needs_template(self) -> bool:
        """Whether its Modelfile has no chat template, so that one must be added by hand.

        Ollama sends prompts as they are then, which a model that was trained on turns has not seen.
        """
        if self.request.format != "ollama" or not self.is_complete:
            return False
        try:
            text = (self.output / "Modelfile").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return not re.search(r"^\s*TEMPLATE\b", text, re.MULTILINE | re.IGNORECASE)

    @property
    def progress(self) -> tuple[str, int | None]:
        """What is being done, and how much of it in percent, where that is known."""
        lines = list(_PROGRESS.finditer(tail(self.folder / LOG_FILE)))
        if not lines:
            return "", None
        return lines[-1]["what"].strip(), min(100, int(lines[-1]["percent"]))

    @property
    def files(self) -> list[tuple[str, int]]:
        """Paths in the folder, and their bytes."""
        return [
            (str(file["path"]), file["bytes"])
            for file in _list(self.result.get("files"), dict)
            if isinstance(file.get("bytes"), int) and "path" in file
        ]

    @property
    def commands(self) -> list[str]:
        """Commands of other programs that take it."""
        return _list(self.result.get("commands"), str)

    @property
    def notes(self) -> list[str]:
        """What the command wants known."""
        return _list(self.result.get("notes"), str)

    @property
    def address(self) -> str:
        """Where it was pushed to; empty if it was not."""
        push = self.result.get("push")
        url = str(push.get("url", "")) if isinstance(push, dict) else ""
        return url if url.startswith(("https://", "http://")) else ""

    @property
    def failure(self) -> tuple[str, str]:
        """Returns the kind of failure, which selects its texts, and the command's own message."""
        log = tail(self.folder / LOG_FILE)
        said = log.rpartition(_MESSAGE_PREFIX)[2].strip() if _MESSAGE_PREFIX in log else ""
        kind = classify_error(said or log) or (
            "explained" if said else "other" if log else "killed"
        )
        return kind, said or "\n".join(log.splitlines()[-6:])


def read_export(folder: Path, in_progress: bool) -> Export | None:
    """Returns the export in a folder; ``None`` if there is none."""
    facts = read_json_object(folder / REQUEST_FILE)
    if not _NAME.fullmatch(folder.name) or not facts:
        return None
    known = {field.name for field in fields(ExportRequest)}
    wish = facts.get("wish")
    given = wish.items() if isinstance(wish, dict) else ()
    request = ExportRequest(**{name: value for name, value in given if name in known})
    result = {} if in_progress else read_json_object(folder / RESULT_FILE)
    state = _state(facts, result, in_progress)
    run_name, created = str(facts.get("run_name", "adapter")), float(facts.get("created", 0.0))
    return Export(folder.name, folder, run_name, request, created, state, result)


def _state(facts: dict[str, Any], result: dict[str, Any], in_progress: bool) -> str:
    if in_progress:
        return "cancelling" if facts.get("cancelled") else "going"
    push = result.get("push")
    if isinstance(push, dict):
        return "pushed" if push.get("pushed") else "asks"
    if result:
        return "finished"
    return "cancelled" if facts.get("cancelled") else "failed"


def checked_name(text: object) -> str:
    """Returns ``text`` if it can be the name of an export. Raises UserError if it cannot."""
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise UserError("export.refused_name", name=shortened(text))
    return text


def _list(values: object, kind: type) -> list[Any]:
    return [one for one in values if isinstance(one, kind)] if isinstance(values, list) else []


def loading_code(export: Export, checkpoint: Path) -> str:
    """Returns Python that loads an export with the usual libraries; empty where there is none."""
    place = (export.request.push_to if export.state == "pushed" else None) or export.run_name
    facts = read_json_object(checkpoint / "provenance.json")
    if export.request.format in (*GGUF_FORMATS, GGUF_ADAPTER):
        return ""
    name = sentence_class(facts)
    if export.request.format == SENTENCES:
        return sentence_code(name, place) if name else ""
    if export.request.format in ("merged", "quantized"):
        return merged_model_code(facts, place)
    base, revision = recorded_base(checkpoint)
    name = export.request.base_name or base
    return adapter_code(facts, place, name, revision, checkpoint)

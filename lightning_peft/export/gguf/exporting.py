"""GGUF exports: merged model, adapter, or both."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_peft.errors import ConfigError
from lightning_peft.export.base import license_of
from lightning_peft.export.card import gguf_card, public_name
from lightning_peft.export.gguf import lora
from lightning_peft.export.gguf.files import KINDS, require_gguf, sha256_of
from lightning_peft.export.gguf.llama_programs import find_program, quantize_file
from lightning_peft.export.gguf.model import GgufModel, prepare_model
from lightning_peft.export.measuring import LogitError, measured_model
from lightning_peft.export.merged_folder import (
    MergedFolder,
    base_checked,
    refuse_full_disk,
    report_of,
)
from lightning_peft.export.output import atomic_folder, check_output_free, write_json
from lightning_peft.export.request import ExportRequest

REPORT = "gguf_report.json"
# What a merged model is quantized from by llama.cpp's program.
_SOURCE = "f32"


def as_gguf(request: ExportRequest) -> dict[str, Any]:
    """Exports GGUF files, which llama.cpp and the programs on it read."""
    export = GgufExport(request)
    with atomic_folder(request.output) as folder:
        files, report = export.run(folder)
        write_json(folder / REPORT, report["gguf"])
        card = gguf_card(request.adapter, license_of(request.base.folder), report["gguf"])
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report | {"commands": export.commands(request.output, files)}


class GgufExport:
    """One export: what can be refused is refused when it is made."""

    def __init__(self, request: ExportRequest) -> None:
        require_gguf()
        self.request = request
        options = request.options
        if options.get("dtype"):
            raise ConfigError(
                f"dtype={options['dtype']!r}: a GGUF file has its own names. Say --outtype "
                f"{' or '.join(KINDS)}."
            )
        self.parts = request.adapter_only or request.separate_adapter
        self.kind = request.outtype or ("f32" if request.adapter_only else "f16")
        self.program = None
        if request.adapter_only and self.kind not in lora.KINDS:
            raise ConfigError(
                f"outtype={self.kind!r}: an adapter is written in {' or '.join(lora.KINDS)}."
            )
        if self.kind not in KINDS:
            self.program = find_program(self.kind, request.llama_quantize)
        check_output_free(request.output)
        self.model = self._prepared()
        self.checked = options.get("check_base", True) and base_checked(
            request.adapter, request.base, self.model.merge, self.model.layout, self._progress
        )

    @property
    def _progress(self) -> Callable[[str, int, int], None]:
        progress: Callable[[str, int, int], None] = self.request.options.get(
            "progress", lambda what, done, total: None
        )
        return progress

    def _prepared(self) -> GgufModel:
        request = self.request
        model = prepare_model(
            request.adapter,
            request.base,
            _SOURCE if self.program else self.kind,
            request.options.get("into"),
            request.chat_template,
        )
        if self.parts:
            lora.check_adapter(model.merge, model.architecture)
        return model

    def run(self, folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        """Writes and measures; returns the files by what they are, and the report."""
        files = self._write(folder)
        measure = self._measure(folder, files)
        record = self._record(folder, files, measure)
        report: dict[str, Any] = {"notes": self.notes, "gguf": record}
        if "model" in files:
            report["merge"] = self._merge_report(record["files"][0]["bytes"], measure)
        return files, report

    def _write(self, folder: Path) -> dict[str, Path]:
        """Writes the files; returns those of ``"model"``, ``"base"`` and ``"adapter"``."""
        request, name = self.request, self.request.adapter.name
        files: dict[str, Path] = {}
        if not self.parts:
            files["model"] = folder / f"{name}-{self.kind}.gguf"
            self._write_model(self.model.write_merged, files["model"], name)
        elif not request.adapter_only:
            called = public_name(request.base_name or request.base.name)
            files["base"] = folder / f"base-{self.kind}.gguf"
            self._write_model(self.model.write_base, files["base"], called)
        if self.parts:
            kind = self.kind if self.kind in lora.KINDS else "f32"
            files["adapter"] = folder / f"{name}-lora-{kind}.gguf"
            outline, architecture = self.model.merge.outline, self.model.architecture
            lora.write_adapter(files["adapter"], outline, architecture, kind, name, self._progress)
        return files

    def _write_model(self, write: Callable[..., int], file: Path, name: str) -> None:
        facts = {"general.name": name}
        license = license_of(self.request.base.folder)
        if license:
            facts["general.license"] = license
        kind = _SOURCE if self.program else self.kind
        bytes_each = {"f32": 4, "q8_0": 1.07}.get(kind, 2)
        refuse_full_disk(self.request.output, int(bytes_each * self.model.numel))
        if self.program is None:
            write(file, kind, facts, self._progress)
            return
        source = file.with_name(f"source-{kind}.gguf")
        write(source, kind, facts, self._progress)
        self._progress(f"quantizing to {self.kind}", 0, 1)
        quantize_file(self.program, source, file, self.kind)
        source.unlink()

    def _measure(
        self, folder: Path, files: dict[str, Path]
    ) -> tuple[LogitError | None, str | None]:
        """Compares the model in the file, read by transformers, with the one in training."""
        reason, lost = None, self.model.architecture.not_read_back
        if "model" not in files:
            reason = "base and adapter are in files of their own"
        elif lost is not None:
            reason = f"transformers does not read {lost} of this GGUF file"

        def load() -> Any:
            file = files["model"].name
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)

        request = self.request
        return measured_model(request.adapter, request.base, load, request.options, reason)

    def _record(
        self,
        folder: Path,
        files: dict[str, Path],
        measure: tuple[LogitError | None, str | None],
    ) -> dict[str, Any]:
        """Returns the record of the files, as primitives without folders of this machine."""
        request, (error, reason) = self.request, measure
        return {
            "files": [
                {
                    "part": part,
                    "file": file.relative_to(folder).as_posix(),
                    "bytes": file.stat().st_size,
                    "sha256": sha256_of(file),
                }
                for part, file in files.items()
            ],
            "outtype": self.kind,
            "architecture": self.model.architecture.family.name,
            "tokenizer": self.model.vocabulary.pre,
            "chat_template": self.model.chat_template is not None,
            "adapter": request.adapter.name,
            "adapter_sha256": request.adapter.facts.get("adapter_sha256"),
            "base": public_name(request.base_name or request.base.name),
            "base_checked": self.checked,
            "into": None if self.parts else self.model.merge.into,
            "logit_error": asdict(error) if error else None,
            "not_measured": reason,
        }

    def _merge_report(
        self, size: int, measure: tuple[LogitError | None, str | None]
    ) -> dict[str, Any]:
        """Returns the same report as of a merged folder."""
        (error, reason), merge = measure, self.model.merge
        result = MergedFolder(
            self.request.output, merge.into, self.kind, size, self.checked, merge.errors
        )
        report = report_of(result, self.request.adapter, self.request.base)
        errors = {} if error is None else {merge.into: asdict(error)}
        output = str(self.request.output)
        return report | {"logit_errors": errors, "not_measured": reason, "output": output}

    @property
    def notes(self) -> list[str]:
        """What a user should know."""
        notes = list(self.model.notes)
        if self.model.chat_template is None:
            notes.append(
                "no chat template is known (--chat-template gives one), so llama.cpp takes ChatML "
                "in conversations"
            )
        if self.parts and self.request.adapter.bits != 16:
            notes.append(
                f"the adapter was trained on a {self.request.adapter.bits}-bit base, and is "
                "applied to another one here: the merged model gives the function in training"
            )
        if self.kind not in ("f32", "f16", "bf16") and not self.parts:
            notes.append(
                f"the errors of the weights are those of merging; those of {self.kind} come on "
                "top, and are in the error of the logits"
            )
        return notes

    def commands(self, output: Path, files: dict[str, Path]) -> list[str]:
        """Returns how llama.cpp loads the files."""
        where = {part: shlex.quote(str(output / file.name)) for part, file in files.items()}
        model = where.get("model") or where.get("base") or "BASE.gguf"
        adapter = f" --lora {where['adapter']}" if "adapter" in where else ""
        return [f"llama-cli -m {model}{adapter}", f"llama-server -m {model}{adapter}"]

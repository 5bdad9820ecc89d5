"""Recipe tab: recipe, command to repeat the run, and provenance."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr

from gradio_app.pages.components import Update, markup
from gradio_app.pages.run.view import CurveOptions
from gradio_app.pages.templating import render
from gradio_app.runs.failures import versions
from gradio_app.runs.files import number, read_json_object
from gradio_app.runs.local import skipped_rows_file
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts


class RecipeTab:
    """The tab of what a run is made of."""

    def __init__(self, studio: Studio, t: Texts) -> None:
        self.studio, self.t = studio, t
        # The folder of runs is never served: what is downloaded is copied here first.
        self._staging = tempfile.TemporaryDirectory(prefix="lightning-peft-")
        markup(render("run.recipe_heading", t))
        text = markup(elem_id="recipe-text")
        download = gr.DownloadButton(
            t("run.recipe_download"), elem_id="recipe-download", size="md", scale=0
        )
        markup(f"<h2>{t('run.command')}</h2>")
        command = markup(elem_id="recipe-command")
        markup(f"<h2>{t('run.facts')}</h2>")
        facts = markup(elem_id="recipe-facts")
        skipped = gr.DownloadButton(
            t("run.left_out"), elem_id="left-out", size="md", scale=0, visible=False
        )
        self.outputs: list[Any] = [text, download, command, facts, skipped]

    def updates(self, run: Run | None, choices: CurveOptions) -> list[Update]:
        """Returns how a run is shown."""
        if run is None:
            return [(gr.skip(), None)] * len(self.outputs)
        text = run.recipe_text
        # A path of the server does not concern a stranger.
        file = "recipe.yaml" if self.studio.settings.space else str(run.folder.recipe)
        command = f"lightning-peft {run.metadata.command} --config {shlex.quote(file)}"
        return [
            render("run.recipe", self.t, text=text),
            (self._staged(run, text), (run.id, text)),
            render("parts.command", self.t, text=command),
            self._facts_of(run),
            self._rows_of(run),
        ]

    def _staged(self, run: Run, text: str) -> str:
        file = Path(self._staging.name) / run.id / "recipe.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return str(file)

    def _rows_of(self, run: Run) -> Update:
        """Returns the button for the rows that were left out, which few runs have."""
        source = skipped_rows_file(run.folder)
        try:
            stamp = source.stat().st_mtime_ns
        except OSError:
            return gr.DownloadButton(visible=False), None
        file = Path(self._staging.name) / run.id / source.name
        file.parent.mkdir(exist_ok=True)
        if not file.is_file() or file.stat().st_mtime_ns != stamp:
            shutil.copy2(source, file)
            if self.studio.settings.space:
                text = run.redactor.record(source.read_text(encoding="utf-8"))
                file.write_text(text, encoding="utf-8")
                os.utime(file, ns=(stamp, stamp))
        return gr.DownloadButton(value=str(file), visible=True), (run.id, stamp)

    def _facts_of(self, run: Run) -> str:
        t, known = self.t, run.redactor.value(read_json_object(run.folder.provenance))
        facts = [(t("run.fact_run"), run.id)]
        if not self.studio.settings.space:
            facts.append((t("run.fact_folder"), str(run.folder.path)))
        if run.created:
            moment = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
            facts.append((t("run.fact_created"), moment))
        for name, key in (("task", "task"), ("seed", "seed"), ("recipe", "recipe_sha256")):
            if known.get(key) is not None:
                facts.append((t(f"run.fact_{name}"), str(known[key])))
        facts += [(t("run.fact_base"), line) for line in _base(known.get("base"), t)]
        data = data_facts(known.get("data"), t)
        facts += [(t("run.fact_data"), data)] if data else []
        if known:
            listed = ", ".join(f"{name} {version}" for name, version in versions(run).items())
            facts.append((t("run.fact_versions"), listed))
            facts.append((t("run.fact_machine"), _machine(known.get("hardware"), t)))
        record = json.dumps(known, indent=1, ensure_ascii=False) if known else ""
        return render("run.facts", t, rows=facts, record=record)


def _base(base: object, t: Texts) -> list[str]:
    if not isinstance(base, dict):
        return []
    lines = []
    for part, entry in base.items():
        found = entry if isinstance(entry, dict) else {}
        name = str(found.get("name_or_path") or "")
        words = [word for word in (name, str(found.get("revision") or "")) if word]
        words.append(t("run.fact_fingerprint", hash=str(found.get("fingerprint", ""))[:16]))
        lines.append(f"{part}: {', '.join(words)}")
    return lines


def data_facts(data: object, t: Texts) -> str:
    """Returns the data of provenance in words; its class where that is all."""
    if not isinstance(data, dict):
        return ""
    place, shape, splits = (data.get(key) for key in ("data", "shape", "splits"))
    words = [place] if isinstance(place, str) else []
    if isinstance(shape, str) and t.has(f"new.shape_{shape}"):
        words.append(t(f"new.shape_{shape}"))
    for name, split in splits.items() if isinstance(splits, dict) else ():
        rows = number(split.get("rows")) if isinstance(split, dict) else None
        if rows and t.has(f"new.fact_{name}"):
            words.append(f"{t(f'new.fact_{name}')}: {t.number(rows)}")
    rows, rejected = number(data.get("rows")), number(data.get("rejected"))
    if rejected and rows:
        words.append(t("run.fact_skipped", n=t.number(rejected), of=t.number(rows)))
    return ", ".join(words) or str(data.get("class", ""))


def _machine(hardware: object, t: Texts) -> str:
    if not isinstance(hardware, dict):
        return ""
    gpus = hardware.get("gpus") or []
    words = [str(hardware.get("processor", "")), t("run.fact_cores", n=hardware.get("cores", "?"))]
    return ", ".join([*words, *map(str, gpus)])

"""Downloads of exports: one archive with the files of the export folder only."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gradio_app.errors import UserError
from gradio_app.export.record import Export
from gradio_app.guards import inside
from gradio_app.runs.types import Run

# Weights are as good as random: packing them would cost time and save nothing.
_COMPRESSED = frozenset({".json", ".md", ".yaml", ".txt", ".jinja", ".model", ".tiktoken", ""})
# What export writes down of a run besides its weights.
_RECORDS = frozenset(
    {
        *("README.md", "adapter_config.json", "provenance.json", "config.json", "Modelfile"),
        *("merge_report.json", "quantization_report.json"),
    }
)
# Files that were staged before have been copied by now.
_STAGED_SECONDS = 600


def build_archive(export: Export, run: Run, staging: Path) -> Path:
    """Returns a new zip of an export, with the recipe of its run, if there is room for it."""
    if not export.is_complete:
        raise UserError("export.refused_not_whole")
    _sweep(staging)
    files = list(iter_files(export.output))
    needed, free = sum(file.stat().st_size for file, _ in files), shutil.disk_usage(staging).free
    # The page keeps a copy of what is fetched from it.
    if 2 * needed > free:
        raise UserError(
            "export.refused_disk", needed=f"{2 * needed / 1e9:.1f}", free=f"{free / 1e9:.1f}"
        )
    place = staging / export.name
    place.mkdir(exist_ok=True)
    target = place / f"{export.run_name}-{export.request.format}.zip"
    with zipfile.ZipFile(target, "w") as made:
        for file, name in files:
            kind = zipfile.ZIP_DEFLATED if file.suffix in _COMPRESSED else zipfile.ZIP_STORED
            place_in = f"{export.run_name}/{name}"
            if file.name in _RECORDS and run.redactor.settings.space:
                text = run.redactor.record(file.read_text(encoding="utf-8"))
                made.writestr(place_in, text, kind)
            else:
                made.write(file, place_in, kind)
        if run.recipe_text and not run.folder.recipe.is_symlink():
            text = run.redactor.portable(run.recipe_text)
            made.writestr(f"{export.run_name}/recipe.yaml", text, zipfile.ZIP_DEFLATED)
    return target


def iter_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yields the files below a folder and their names in it; links are passed over."""
    for place, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(files):
            file = Path(place) / name
            if not file.is_symlink() and file.is_file():
                relative = file.relative_to(folder).as_posix()
                yield inside(folder, relative), relative


def _sweep(staging: Path) -> None:
    for place in staging.iterdir():
        if time.time() - place.stat().st_mtime > _STAGED_SECONDS:
            shutil.rmtree(place, ignore_errors=True)

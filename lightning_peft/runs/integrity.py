"""Integrity check of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.provenance import text_digest

Check = engine.Check


def run_of(path: Path) -> RunFolder | None:
    """Returns the run that ``path`` is, or that an adapter folder or checkpoint belongs to."""
    for folder in (path, *path.resolve().parents[:3]):
        if (folder / "provenance.json").is_file() and (folder / "recipe.yaml").is_file():
            return RunFolder(folder)
    return None


def adapters_in(path: Path) -> list[Path]:
    """Returns the adapter folders of a run, or the one that ``path`` is."""
    if (path / "adapter_config.json").is_file():
        return [path]
    if path.suffix == ".ckpt":
        path = path.parent / "adapters" / path.stem
    folders = sorted(file.parent for file in path.rglob("adapter_config.json"))
    if not folders:
        raise ConfigError(
            f"{str(path)!r} is neither an adapter folder nor a run with one: there is no "
            "adapter_config.json in it. Name a folder below `runs`, or an adapter folder."
        )
    return folders


def file_checks(path: Path) -> list[Check]:
    """Returns the checks that need no model: hashes, and records that name each other."""
    run = run_of(path)
    facts = _read(run.provenance) if run is not None else {}
    checks = []
    if run is not None:
        recipe = text_digest(run.recipe.read_text(encoding="utf-8"))
        same = recipe == facts["recipe_sha256"]
        detail = "sha256 as recorded" if same else "recipe.yaml was changed since the run"
        checks.append(Check("the recipe is the one that was run", same, detail))
    for folder in adapters_in(path):
        checks += _adapter_checks(folder, facts)
    return checks


def _adapter_checks(folder: Path, run: dict[str, Any]) -> list[Check]:
    name = f"adapter {folder.name}"
    try:
        fields, tensors, facts = engine.read_adapter(folder, allow_diverged=True)
    except CheckpointError as error:
        return [Check(f"{name}: the weights are those that were saved", False, str(error))]
    hashed = "adapter_sha256" in facts
    checks = [
        Check(
            f"{name}: the weights are those that were saved",
            True if hashed else None,
            "sha256 as recorded" if hashed else "plain PEFT records no hash",
        )
    ]
    if diverged := engine.diverged_tensors(fields, tensors):
        detail = f"NaN or infinite values in {', '.join(diverged[:3])}: training diverged"
        checks.append(Check(f"{name}: its values are finite", False, detail))
    if not run:
        return checks
    other = [key for key in ("recipe_sha256", "task", "data") if facts.get(key) != run.get(key)]
    bases = {entry["fingerprint"] for entry in run["base"].values()}
    if facts.get("base", {}).get("fingerprint") not in bases:
        other.append("base")
    detail = "recipe, task, data and base as in the run's provenance.json"
    if other:
        detail = f"its provenance.json has other {', '.join(other)} than the run's"
    return [*checks, Check(f"{name}: it was made by this run", not other, detail)]


def data_check(run: RunFolder, datamodule: Any) -> Check:
    """Returns whether the data is still what the run was trained on."""
    name = "the data is what was trained on"
    recorded = (_read(run.provenance)["data"] or {}).get("key")
    record = getattr(datamodule, "record", None)
    if recorded is None or not isinstance(record, dict):
        return Check(name, None, "a data module of your own: no fingerprint was recorded")
    same = record["key"] == recorded
    detail = f"fingerprint {recorded} of rows and settings"
    if not same:
        detail = f"fingerprint {record['key']} now, {recorded} then: rows or settings have changed"
    return Check(name, same, detail)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content

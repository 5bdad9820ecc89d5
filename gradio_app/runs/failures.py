"""Explanations of failed runs, from their error, log and state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gradio_app.guards import redacted
from gradio_app.runs.files import read_json_object, tail
from gradio_app.runs.local import START_LOG
from gradio_app.runs.types import Run
from lightning_peft import errors

# Kinds of causes, and the patterns that show them in an error's name or message. The first match
# counts. Each has texts `why_KIND` and `todo_KIND`.
_SIGNS: tuple[tuple[str, str], ...] = (
    ("gpu_memory", r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    ("memory", r"MemoryError|DefaultCPUAllocator|Cannot allocate memory|can't allocate memory"),
    ("disk", r"No space left on device|Errno 28|Disk quota exceeded"),
    ("gated", r"GatedRepo|gated repo|\b401\b|\b403\b|restricted access|Unauthorized"),
    (
        "offline",
        r"LocalEntryNotFound|OfflineMode|couldn't connect|Connection ?Error|Cannot reach|ProxyError"
        r"|Name or service not known|Temporary failure in name resolution|MaxRetryError"
        r"|HF_HUB_OFFLINE|offline mode",
    ),
    ("rows", r"\brows? \d+|\bRow \d+"),
    ("gpu", r"no CUDA|No supported gpu|No CUDA GPUs|CUDA driver|CUDA error"),
)
REPORT_LINES = 40
_PACKAGES = ("lightning-peft", "torch", "lightning", "transformers", "peft", "bitsandbytes")
_OWN = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.LightningPeftError)
}


@dataclass(frozen=True)
class Failure:
    """Why a run ended: the kind, which selects the texts, and its own words, redacted."""

    kind: str
    message: str
    details: str


def find_failure(run: Run) -> Failure | None:
    """Returns why a run ended, ``None`` if it did not fail."""
    found = _classify(run)
    if found is None:
        return None
    return Failure(found.kind, *map(run.redactor.text, (found.message, found.details)))


def _classify(run: Run) -> Failure | None:
    if run.status.state not in ("failed", "crashed"):
        return None
    error = read_json_object(run.folder.error)
    kind, message = str(error.get("error", "")), str(error.get("message", ""))
    log = tail(run.folder.log, REPORT_LINES)
    if run.status.state == "crashed":
        return Failure(classify_error(log) or "killed", "", log or _start(run))
    if not error:
        start = _start(run)
        message = start.rpartition("lightning-peft: ")[2] if "lightning-peft: " in start else ""
        found = classify_error(start) or ("explained" if message else "start")
        return Failure(found, message, start)
    trace = error.get("traceback")
    details = "".join(map(str, trace)) if isinstance(trace, list) else message
    # What this package refuses, it explains itself.
    found = classify_error(f"{kind} {message}") or ("explained" if kind in _OWN else "other")
    return Failure(found, redacted(f"{kind}: {message}" if kind else message), redacted(details))


def _start(run: Run) -> str:
    return tail(run.folder.path / START_LOG, REPORT_LINES)


def classify_error(text: str) -> str | None:
    """Returns the kind of cause that a text shows, if it shows one."""
    return next((kind for kind, sign in _SIGNS if re.search(sign, text)), None)


def report(run: Run) -> str:
    """Returns a report for support: versions, recipe, error and last lines, redacted."""
    failure = find_failure(run)
    parts = [
        f"run: {run.id} ({run.status.state}: {run.status.phase})",
        "versions: " + ", ".join(f"{name} {version}" for name, version in versions(run).items()),
        f"recipe:\n{run.recipe_text.strip()}",
    ]
    if failure is not None and failure.message:
        parts.append(f"error:\n{failure.message}")
    lines = tail(run.folder.log, REPORT_LINES) or _start(run)
    parts.append(f"last lines:\n{run.redactor.text(lines)}")
    text = run.redactor.record(redacted("\n\n".join(parts)))
    return text.replace(str(Path.home()), "~")


def versions(run: Run) -> dict[str, str]:
    """Returns the versions that a run had, or those that are installed, without importing them."""
    known = read_json_object(run.folder.provenance, "versions")
    if known:
        return {str(name): run.redactor.text(str(version)) for name, version in known.items()}
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

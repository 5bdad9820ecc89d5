"""The complete merge: find, merge, measure, and write the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_peft.engine.files.adapter_files import write_file
from lightning_peft.engine.streamed_merging import Into
from lightning_peft.export.adapters import Adapter, find_adapter
from lightning_peft.export.base import license_of
from lightning_peft.export.card import merged_card, public_name
from lightning_peft.export.measuring import PROMPTS, LogitError, measure_merge, measured
from lightning_peft.export.merged_folder import (
    REPORT,
    Progress,
    base_of,
    merge_into_folder,
    report_of,
)


def merge(
    adapter: str | Adapter,
    output: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    into: Into | None = None,
    prompts: Sequence[str] | None = None,
    measure: bool = True,
    check_base: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Merges an adapter into a model folder, compares outputs, and writes the model card.

    Args:
        adapter: An adapter folder, a checkpoint, or the folder of a run; or what was found there.
        output: The folder to make.
        base: Folder or hub name of the base; by default the recorded one.
        revision: Branch, tag or commit of the base on the hub.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``; by default that of the base, and
            bfloat16 for a wider one.
        into: ``"dequantized"`` or ``"original"``.
        prompts: What outputs are compared on.
        measure: Compare outputs, where the model fits in memory.
        check_base: Refuse a base other than the recorded one.
        progress: Called with a text about the current step.

    Returns:
        What merging did, as primitives; the folder holds the same as ``merge_report.json``.

    Raises:
        LightningPeftError: See :func:`lightning_peft.export.merged_folder.merge_into_folder`.
    """
    found = find_adapter(adapter) if isinstance(adapter, str) else adapter
    source = base_of(found, base, revision)
    target = getattr(torch, dtype) if dtype else None
    result = merge_into_folder(
        found, output, source, dtype=target, into=into, check_base=check_base, progress=progress
    )
    errors: dict[str, LogitError] | None = None
    reason: str | None = "it was not asked for"
    if measure:
        stored, texts = getattr(torch, result.dtype), prompts or PROMPTS
        options: Any = {"prompts": texts, "check_base": check_base, "progress": progress}
        errors, reason = measured(
            found,
            source,
            lambda: measure_merge(found, source, output, result.into, stored, **options),
        )
    report = report_of(result, found, source) | {
        "logit_errors": {way: asdict(error) for way, error in (errors or {}).items()},
        "not_measured": reason,
    }
    # The folder travels: it does not tell the paths of this machine.
    public = report | {"adapter": found.name, "base": public_name(source.name)}
    card = merged_card(found, license_of(source.folder), report)
    write_file(output / REPORT, (json.dumps(public, indent=2) + "\n").encode())
    write_file(output / "README.md", card.encode())
    return {"output": str(output), **report}

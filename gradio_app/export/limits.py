"""When an export is refused before it begins: memory, disk, and what a public page allows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from gradio_app.errors import UserError
from gradio_app.export.base_size import BaseSize
from gradio_app.runs.types import Run
from gradio_app.settings import Settings

# How many exports of a run a public page keeps.
MAX_EXPORTS_ON_SPACE = 4


def check_machine(busy: Run | None, owner: str) -> None:
    """Refuses what needs memory while a run uses the machine.

    Raises:
        UserError: If one does.
    """
    if busy is None:
        return
    if busy.owner != owner:
        raise UserError("export.refused_busy_other")
    raise UserError("export.refused_busy", name=busy.name)


def check_size(size: BaseSize | None, settings: Settings) -> None:
    """Refuses a model that is too large for a public page, or for the disk.

    Raises:
        UserError: If it is.
    """
    most = settings.limits.parameters
    if most is not None and size is None:
        raise UserError("export.refused_unknown")
    if size is None:
        return
    if most is not None and size.parameters > most:
        raise UserError(
            "export.refused_large",
            billions=f"{size.parameters / 1e9:.2g}",
            most=f"{most / 1e9:.2g}",
        )
    # One that is written, and one that is being finished.
    free = shutil.disk_usage(settings.runs).free
    if 2 * size.merged_bytes > free:
        needed = f"{2 * size.merged_bytes / 1e9:.1f}"
        raise UserError("export.refused_disk", needed=needed, free=f"{free / 1e9:.1f}")


def check_count(kept: Sequence[object], settings: Settings) -> None:
    """Refuses one more export than a public page keeps.

    Raises:
        UserError: If there are so many.
    """
    if settings.space and len(kept) >= MAX_EXPORTS_ON_SPACE:
        raise UserError("export.refused_many", most=MAX_EXPORTS_ON_SPACE)

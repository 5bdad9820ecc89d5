"""Server settings, fixed at start."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What one visitor may use. On a laptop nothing but uploads is limited.

    Attributes:
        upload_bytes: Largest file that can be uploaded.
        rows: Most rows of a data set, or ``None``.
        steps: Most optimizer steps of a run, or ``None``.
        minutes: Longest time that a run may take, or ``None``.
        parameters: Largest base, in weights, or ``None``.
        waiting: Most runs of one visitor that run or wait, or ``None``.
        keep_hours: After how many hours a visitor's runs and uploads are deleted, or ``None``.
    """

    upload_bytes: int = 500 * MEGABYTE
    rows: int | None = None
    steps: int | None = None
    minutes: float | None = None
    parameters: int | None = None
    waiting: int | None = None
    keep_hours: float | None = None


# A public page on two shared cores: minutes for everyone instead of hours for one.
DEMO_LIMITS = Limits(
    upload_bytes=5 * MEGABYTE,
    rows=2_000,
    steps=200,
    minutes=10,
    parameters=1_000_000_000,
    waiting=2,
    keep_hours=24,
)
# The GPU is lent for two minutes; a run that is stopped before saves what it has.
ZERO_GPU_LIMITS = replace(DEMO_LIMITS, minutes=1.5)


@dataclass(frozen=True)
class Settings:
    """What a server of the page was started with.

    Attributes:
        runs: Folder of all runs.
        data_root: Folder below which data may be named by path; ``None`` where none may.
        models_root: Folder whose subfolders are offered as models; ``None`` where none are.
        uploads: Folder for what visitors upload, a folder for each owner.
        limits: What one visitor may use.
        space: Whether the page is a Hugging Face Space, open to strangers.
        zero_gpu: Whether that Space has ZeroGPU, so that runs are lent a GPU for a short time.
        command: How the command line is started, as a list of arguments.
        tick_seconds: Seconds between updates of the page of an active run, at first.
        max_concurrent_runs: How many runs this machine executes at a time; others are queued.
    """

    runs: Path = Path("runs")
    data_root: Path | None = Path()
    models_root: Path | None = None
    uploads: Path = Path("runs/uploads")
    limits: Limits = field(default_factory=Limits)
    space: bool = False
    zero_gpu: bool = False
    command: tuple[str, ...] = (sys.executable, "-m", "lightning_peft.cli")
    tick_seconds: float = 1.0
    max_concurrent_runs: int = 1

    @classmethod
    def on_this_machine(cls, runs: Path, data_root: Path, models_root: Path | None) -> Settings:
        """Returns the settings of a page for one person, or for those who know its password."""
        return cls(
            runs=runs.resolve(),
            data_root=data_root.resolve(),
            models_root=models_root.resolve() if models_root else None,
            uploads=runs.resolve() / "uploads",
        )

    @classmethod
    def on_a_space(cls, storage: Path) -> Settings:
        """Returns the settings of a page for strangers: no path of theirs, and limits."""
        return cls(
            runs=storage.resolve() / "runs",
            data_root=None,
            uploads=storage.resolve() / "uploads",
            limits=ZERO_GPU_LIMITS if has_zero_gpu() else DEMO_LIMITS,
            space=True,
            zero_gpu=has_zero_gpu(),
        )


def is_space() -> bool:
    """Whether this process is a Hugging Face Space."""
    return bool(os.environ.get("SPACE_ID"))


def has_zero_gpu() -> bool:
    """Whether this process is a Space with ZeroGPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")

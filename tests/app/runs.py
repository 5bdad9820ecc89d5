"""Runs for the tests of the page: made on disk, and carried out by the fake trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Limits, Settings
from lightning_peft.runs.folder import RunFolder

FAKE = str(Path(__file__).with_name("fake_trainer.py"))
Found = TypeVar("Found")


def settings(folder: Path, limits: Limits | None = None, **changes: Any) -> Settings:
    """Returns settings of a server whose runs are fakes in ``folder``."""
    made = Settings.on_this_machine(folder / "runs", folder / "data", None)
    for place in (made.runs, folder / "data"):
        place.mkdir(parents=True, exist_ok=True)
    command = (sys.executable, FAKE)
    return replace(made, command=command, limits=limits or Limits(), **changes)


def recipe(**fake: Any) -> str:
    """Returns a recipe that tells the fake trainer what to do."""
    return str(yaml.safe_dump({"seed_everything": 0, "fake": fake}))


def queued(store: RunStore, name: str, owner: str = "local", **fake: Any) -> Run:
    """Makes a run that waits for whichever server looks after the folder."""
    run = store.create(owner, recipe(**fake), name)
    return store.update_metadata(run, waiting=time.time())


def erase_runs(store: RunStore) -> None:
    """Erases all runs of a server, once they are over: its page is that of a new one again."""
    for run in store.list("local"):
        until(lambda run=run: not store.get("local", run.id).active)  # type: ignore[misc]
        store.erase("local", run.id)
    store.erase_deleted(seconds=0)


def save_adapter(folder: RunFolder, name: str, step: int | None, **config: object) -> Path:
    """Writes an adapter without tensors as a checkpoint of a run, and returns its folder."""
    made = folder.checkpoints / "adapters" / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "adapter_model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    folder.write(made / "adapter_config.json", config)
    folder.write(made / "provenance.json", {"global_step": step})
    return made


def until(found: Callable[[], Found], seconds: float = 120.0) -> Found:
    """Waits until something is found, and returns it; on a busy machine for long."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return value

"""Sweep state and trial table on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import StatusFile

# Called with the table, how many trials are done, and what is being done.
Report = Callable[[dict[str, Any], int, str], None]


@contextmanager
def recorded(folder: RunFolder, trials: int) -> Iterator[Report]:
    """Keeps ``status.json`` and ``trials.json`` of a sweep, and writes down how it ends."""
    folder.error.unlink(missing_ok=True)
    status = StatusFile(folder.status_file, "sweep")
    done = 0

    def report(table: dict[str, Any], ended: int, phase: str) -> None:
        nonlocal done
        done = ended
        folder.write(folder.trials, table)
        status.update(state="running", phase=phase, step=done, total_steps=trials)

    def end(state: str, phase: str) -> None:
        # A disk that is full must not hide the reason.
        with suppress(OSError):
            status.update(state=state, phase=phase)

    try:
        yield report
    except KeyboardInterrupt:
        end("stopped", "stopped at once")
        raise
    except BaseException as error:
        with suppress(OSError):
            folder.write_error(error)
        end("failed", f"failed: {type(error).__name__}")
        raise
    else:
        whole = done == trials
        end("finished" if whole else "stopped", "finished" if whole else "stopped and saved")
    finally:
        status.close()

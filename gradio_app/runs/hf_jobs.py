"""Hugging Face Jobs: runs in, and paid by, the visitor's account.

The job outlives the page, the tab and the visitor. Its log carries the folder of the run
(``job_script``), which is rebuilt here, so that the page of the run shows it as any other. The
visitor's token is never written down: it is used while they look at the page, and the job gets its
own as a secret of the hub.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from gradio_app.errors import UserError
from gradio_app.guards import checked_hub_name, redacted
from gradio_app.runs.job_script import JSON_FILES, JSONL_FILES, LINE_PREFIX
from gradio_app.runs.types import Executor, Run
from gradio_app.settings import Settings
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.status import ACTIVE, Status, read_status, write_json

_log = logging.getLogger(__name__)
JOB_FILE = "job.json"
# Where such a run is, in what the page knows of it.
EXECUTOR = "hf_jobs"
# A token is forgotten so long after its owner last looked.
TOKEN_SECONDS = 120.0
# An image that has uv, which installs the rest into a container of its own.
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
# On a Space, this package is the root of its repository.
SPACE = Path(__file__).resolve().parents[1]
_WHEEL = re.compile(r"lightning-peft(\[[\w,]+\])? @ https://\S+\.whl#sha256=[0-9a-f]{64}$")
_SCRIPT = Path(__file__).with_name("job_script.py")
# How the hub calls the states of jobs, and what the page calls them.
_ENDED = {"COMPLETED": "finished", "CANCELED": "stopped", "ERROR": "failed", "DELETED": "stopped"}


@dataclass(frozen=True)
class Hardware:
    """A machine on the hub, with the hub's name for it and one for people."""

    flavor: str
    title: str
    dollars_per_hour: float


@dataclass
class Job:
    """A run on the hub, as ``job.json`` in its folder keeps it.

    ``namespace`` is the account that pays, ``minutes`` the time limit, ``repository`` where the
    adapter is pushed, and ``lines`` how many lines of the log were read.
    """

    id: str
    namespace: str
    flavor: str
    minutes: float
    repository: str
    lines: int = 0


def _api(token: str) -> Any:
    # Half a second of import, which a page without jobs never needs.
    return import_module("huggingface_hub").HfApi(token=token)


def list_hardware(token: str) -> list[Hardware]:
    """Returns the machines that the hub lends, the cheapest first, with what they cost now."""
    found = []
    for one in _api(token).list_jobs_hardware():
        per_hour = one.unit_cost_usd * (60 if one.unit_label == "minute" else 1)
        graphics = one.accelerator
        more = f", {graphics.quantity} x {graphics.model}" if graphics else ""
        found.append(Hardware(one.name, f"{one.pretty_name}{more}, {one.ram}", per_hour))
    return sorted(found, key=lambda machine: machine.dollars_per_hour)


def max_cost(machine: Hardware, minutes: float) -> float:
    """Returns the maximum cost of a job, in dollars."""
    return machine.dollars_per_hour * minutes / 60


def job_packages(folder: Path = SPACE) -> list[str]:
    """Returns the lines that the Space itself installs: its wheel, by address and hash, and pins.

    Raises:
        UserError: If ``requirements.txt`` names no wheel by address, which a job could fetch. A
            bare name would install whatever an index has under it.
    """
    file = folder / "requirements.txt"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    packages = [line for line in lines if line and not line.startswith("#")]
    if not any(_WHEEL.match(line) for line in packages):
        raise UserError("hub_job.no_wheel")
    return packages


def start_job(
    folder: RunFolder,
    token: str,
    flavor: str,
    minutes: float,
    repository: str,
    packages: Sequence[str],
) -> Job:
    """Hands a run to the hub; raises UserError if its recipe needs files of this machine.

    Args:
        folder: Folder of the run, with its recipe.
        token: The visitor's, with the scopes ``jobs`` and ``contribute-repos``.
        flavor: One of :func:`list_hardware`.
        minutes: After how many minutes the hub ends it.
        repository: ``namespace/name`` on the hub for the adapter.
        packages: What the job installs, as pip takes it: :func:`job_packages`.
    """
    repository = checked_hub_name(repository)
    recipe = folder.recipe.read_text(encoding="utf-8")
    local = sorted(local_paths(yaml.safe_load(recipe)))
    if local:
        raise UserError("errors.only_here", paths=", ".join(Path(path).name for path in local))
    api = _api(token)
    namespace = str(api.whoami()["name"])
    installed = [word for package in packages for word in ("--with", package)]
    info = api.run_job(
        image=IMAGE,
        command=["uv", "run", *installed, "python", "-c", _SCRIPT.read_text("utf-8")],
        env={"RECIPE": recipe, "PUSH_TO": repository},
        secrets={"HF_TOKEN": token},
        flavor=flavor,
        timeout=f"{round(minutes * 60)}s",
        labels={"lightning-peft-run": folder.path.name},
        namespace=namespace,
        token=token,
    )
    job = Job(info.id, namespace, flavor, minutes, repository)
    _save(folder, job)
    now = time.time()
    first = Status(phase="waiting for a machine on the hub", started=now, updated=now)
    write_json(folder.status_file, asdict(first))
    return job


def local_paths(recipe: Any) -> set[str]:
    """Returns the settings of a recipe that name files of this machine.

    What comes with the package (``package:``, ``recipe:``) is on every machine.
    """
    if isinstance(recipe, dict):
        return {path for value in recipe.values() for path in local_paths(value)}
    if isinstance(recipe, list):
        return {path for value in recipe for path in local_paths(value)}
    if not isinstance(recipe, str):
        return set()
    here = recipe.startswith("installed:") or Path(recipe).is_absolute() or Path(recipe).exists()
    return {recipe} if here else set()


def job_of(folder: RunFolder) -> Job | None:
    """Returns the job that a run is, or ``None`` for a run on this machine."""
    file = folder.path / JOB_FILE
    if not file.is_file():
        return None
    return Job(**json.loads(file.read_text(encoding="utf-8")))


def status_of(folder: RunFolder) -> Status | None:
    """Returns the last status of the job; its process cannot be inspected."""
    return read_status(folder.status_file, inspect_process=False)


def _require_job(folder: RunFolder) -> Job:
    job = job_of(folder)
    if job is None:
        raise UserError("errors.no_such_run", run=folder.path.name)
    return job


def refresh(folder: RunFolder, token: str) -> None:
    """Brings the folder of a run up to what its job has said."""
    job, api = _require_job(folder), _api(token)
    where = {"job_id": job.id, "namespace": job.namespace}
    # The stage first: the last output of a job is then in the lines that follow.
    stage = api.inspect_job(**where).status.stage
    stage = str(getattr(stage, "value", stage))
    lines = list(api.fetch_job_logs(**where))
    rebuild_folder(folder, lines[job.lines :])
    job.lines = max(job.lines, len(lines))
    _save(folder, job)
    last = status_of(folder) or Status()
    if stage in _ENDED and last.state in (*ACTIVE, "queued"):
        ended = asdict(last) | {"state": _ENDED[stage], "eta_seconds": None}
        write_json(folder.status_file, ended)


def cancel(folder: RunFolder, token: str) -> None:
    """Ends the job of a run."""
    job = _require_job(folder)
    _api(token).cancel_job(job_id=job.id, namespace=job.namespace)


def rebuild_folder(folder: RunFolder, lines: Iterable[str]) -> None:
    """Writes into the folder what lines of the log hold of it; others are the log of the run.

    The log is text that a program on another machine has printed: only known names are written,
    and only JSON.
    """
    for line in lines:
        text = line.rstrip("\n")
        name, content = _parse(text)
        if name in JSONL_FILES:
            folder.append(folder.path / name, content)
        elif name in JSON_FILES:
            write_json(folder.path / name, content)
        else:
            with folder.log.open("a", encoding="utf-8") as log:
                log.write(redacted(text) + "\n")


def _parse(text: str) -> tuple[str, Any]:
    if not text.startswith(LINE_PREFIX):
        return "", None
    try:
        row = json.loads(text[len(LINE_PREFIX) :])
        content = json.loads(row["line"])
    except (ValueError, KeyError, TypeError):
        return "", None
    return (str(row.get("file")), content) if isinstance(content, dict) else ("", None)


def _save(folder: RunFolder, job: Job) -> None:
    write_json(folder.path / JOB_FILE, asdict(job))


class JobsExecutor(Executor):
    """Runs that are jobs on the hub, kept up to date while somebody looks at them.

    Reading a log takes seconds, so a page never waits for it: each look starts it in a thread,
    unless the last one is still going on or not long ago. Tokens are kept in memory alone, for as
    long as their owner looks.
    """

    uses_this_machine = False
    SECONDS = 10.0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._lock = threading.Lock()
        self._next: dict[Path, float] = {}
        self._tokens: dict[Path, tuple[str, float]] = {}

    def look(self, folder: RunFolder, token: str | None) -> None:
        """Brings the folder up to date, soon; without a token nothing new can be seen."""
        now = time.monotonic()
        with self._lock:
            fresh = {p: kept for p, kept in self._tokens.items() if now - kept[1] < TOKEN_SECONDS}
            self._tokens = fresh | ({folder.path: (token, now)} if token else {})
            if token is None or now < self._next.get(folder.path, 0.0):
                return
            self._next[folder.path] = math.inf
        threading.Thread(target=self._refresh, args=(folder, token), daemon=True).start()

    def _refresh(self, folder: RunFolder, token: str) -> None:
        try:
            refresh(folder, token)
        except Exception as error:
            # The hub may be away for a while; the next look tries again.
            _log.warning("job of %s: %s", folder.path.name, redacted(repr(error)))
        finally:
            with self._lock:
                self._next[folder.path] = time.monotonic() + self.SECONDS

    def start(self, run: Run) -> None:
        """Refuses: a job is started with its owner's token and consent, by :func:`start_job`."""
        raise UserError("hub_job.not_from_line")

    def stop(self, run: Run) -> None:
        """Ends the job; it saves what it has, as far as the hub lets it."""
        with self._lock:
            token = self._tokens.get(run.folder.path, ("", 0.0))[0]
        if not token:
            raise UserError("hub_job.sign_in")
        threading.Thread(target=cancel, args=(run.folder, token), daemon=True).start()

    def save(self, run: Run) -> None:
        """Refuses: nothing can be sent to a job."""
        raise UserError("hub_job.not_saved")

    def kill(self, run: Run) -> None:
        """The same as :meth:`stop`: the hub knows one way to end a job."""
        self.stop(run)

    def active(self, run: Run) -> bool:
        """Whether the job is running, as far as is known."""
        return run.status.state in ACTIVE

    def in_progress(self, folder: RunFolder) -> bool:
        """Whether there is a job that has not written a status yet."""
        return job_of(folder) is not None

    def status(self, folder: RunFolder) -> Status | None:
        """Returns the last status of the job."""
        return status_of(folder)

"""Run folder and model hub: access and free space."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from importlib import import_module
from pathlib import Path

from lightning_peft.doctor import remedies
from lightning_peft.doctor.results import CheckResult, Status, error_line

_MIB, _GIB = 2**20, 2**30
_WRITTEN = 8 * _MIB
_LITTLE = 2 * _GIB
_SLOW_SECONDS = 2.0
_TIMEOUT_SECONDS = 5.0
# Any public model does: an answer of any kind shows that the hub is there.
_MODEL = "openai-community/gpt2"


def check_folder(folder: Path) -> CheckResult:
    """Writes a file where runs would be written, through to the disk, and takes it away again.

    A folder that is not there yet is not made; its nearest parent is tried.
    """
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    shown = str(folder) if place == folder.expanduser().absolute() else f"{folder} (in {place})"
    remedy = remedies.FOLDER
    if not place.is_dir():
        return CheckResult("failed", f"{shown}: {place} is a file", remedy)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".lightning-peft-doctor-") as file:
            file.write(os.urandom(_WRITTEN))
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        return CheckResult("failed", f"{shown}: {error_line(error)}", remedy)
    free = shutil.disk_usage(place).free
    detail = (
        f"{shown}: writable, {free / _GIB:.1f} GiB free, {_WRITTEN // _MIB} MiB reach the disk "
        f"in {seconds:.2f} s"
    )
    if free < _LITTLE:
        return CheckResult("warning", detail, f"Make room, or: {remedy}")
    if seconds > _SLOW_SECONDS:
        detail += ", which makes every checkpoint slow"
        return CheckResult("warning", detail, remedy)
    return CheckResult("ok", detail)


def check_hub(needed: bool) -> CheckResult:
    """Asks the Hugging Face hub for something, unless HF_HUB_OFFLINE forbids it."""
    hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    constants = import_module("huggingface_hub.constants")
    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        detail = f"HF_HUB_OFFLINE is set: {address} was not asked, only cached models load"
        if needed:
            return CheckResult("failed", detail, "Unset HF_HUB_OFFLINE, or drop --hub.")
        return CheckResult("skipped", detail)
    started = time.perf_counter()
    status: Status = "failed" if needed else "warning"
    remedy = (
        "Check network, proxy (HTTPS_PROXY) and HF_ENDPOINT. Models in the cache or in a folder "
        "load all the same; with HF_HUB_OFFLINE=1 nothing waits for the network."
    )
    try:
        hub.HfApi().model_info(_MODEL, timeout=_TIMEOUT_SECONDS)
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code >= 500:
            return CheckResult(status, f"{address} answers with error {code}", remedy)
    # The library below changes between its releases, and its errors with it.
    except Exception as error:
        return CheckResult(status, f"{address}: {error_line(error)}", remedy)
    return CheckResult("ok", f"{address} answers in {time.perf_counter() - started:.2f} s")

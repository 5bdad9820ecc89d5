"""Launcher of the process, detected from environment variables."""

from __future__ import annotations

import os
import re
from traceback import walk_tb

from lightning_peft.errors import ConfigError, itemize

# Of torchrun and Kubeflow, SLURM, MPI, LSF: the number of a process among those of all nodes.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK")
# What Lightning sets, or takes from the user, where it starts the processes itself.
_PLACES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
# How torch says that a process of a DataLoader is gone, and that it raised an error.
_ENDED_WORKER = re.compile(
    r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", re.DOTALL
)
_RAISED_IN_WORKER = re.compile(r"Caught \w+ in ")


def is_first_process() -> bool:
    """Whether this process is the first of all that train together."""
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), None)
    if rank is not None:
        return rank == "0"
    return all(os.environ.get(name, "0") == "0" for name in _PLACES)


def is_started_by_torchrun() -> bool:
    """Whether an agent of torchrun watches over this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def can_restart() -> bool:
    """Whether torchrun may start the processes again."""
    return is_started_by_torchrun() and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def check_restarts(has_folder: bool) -> None:
    """Checks that the run can continue when torchrun starts its processes again."""
    if not can_restart():
        return
    problems = []
    if not has_folder:
        problems.append(
            "there is no --run_dir, and each restart would begin again in a new folder. Name one"
        )
    problems += stale_addresses()
    if problems:
        raise ConfigError("torchrun --max-restarts could not continue the run:" + itemize(problems))


def stale_addresses() -> list[str]:
    """Returns why processes that torchrun starts again would wait for ever, if they would."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("WORLD_SIZE") == "1":
        return []
    # https://github.com/pytorch/pytorch/issues/135712, seen with torch 2.13 on 2026-11-30.
    return [
        "torchrun keeps the addresses of processes that are gone, and those that are started "
        "again wait for them. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts"
    ]


def is_restarted() -> bool:
    """Whether torchrun did so before it started this process."""
    return is_started_by_torchrun() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def is_last_restart() -> bool:
    """Whether torchrun starts nothing again if this process ends by an error."""
    counts = (
        os.environ.get(f"TORCHELASTIC_{one}", "0") for one in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    done, most = map(int, counts)
    return done >= most


def torchrun_layout() -> tuple[int, int] | None:
    """Returns processes on a node, and nodes, as torchrun started them; ``None`` without it."""
    if not is_started_by_torchrun():
        return None
    here, all_of_them = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if all_of_them % here:
        raise ConfigError(
            f"torchrun started {all_of_them} processes, {here} of them on this node: Lightning "
            "needs as many on each. Give the same --nproc-per-node everywhere."
        )
    return here, all_of_them // here


def ended_process(error: BaseException) -> str | None:
    """Returns which process has ended, in words, where that is what an error says."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    if _RAISED_IN_WORKER.match(text):
        # What the process itself raised: its message may quote any of the words below.
        return None
    if _ENDED_WORKER.match(text) or _is_of_multiprocessing(error):
        return (
            "a process that loads batches was ended from outside, as the system does when memory "
            "runs out. A lower num_workers or batch_size needs less"
        )
    if re.search(r"gloo/transport|Connection (closed|reset) by peer|remote process exited", text):
        return (
            "another of its processes has ended or cannot be reached; that one's own output, or "
            "the system's log, has the reason"
        )
    return None


def _is_of_multiprocessing(error: BaseException) -> bool:
    """Whether another process of Python's went away while it sent something, such as a tensor."""
    if not isinstance(error, (ConnectionError, EOFError)):
        return False
    names = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return bool(names) and str(names[-1]).startswith("multiprocessing.")

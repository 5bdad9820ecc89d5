"""Services shared by all pages of a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradio_app.chat.sessions import ChatSessions
from gradio_app.experiments.summaries import Summaries
from gradio_app.experiments.sweeps import SweepRequest, prepare_sweep
from gradio_app.export.manager import ExportManager
from gradio_app.recipe.answer_cache import AnswerCache
from gradio_app.recipe.command_worker import CommandWorker
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs import hf_jobs, zero_gpu
from gradio_app.runs.local import LocalExecutor
from gradio_app.runs.metadata import LOCAL
from gradio_app.runs.run_queue import RunQueue
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Executor, Run
from gradio_app.settings import Settings
from gradio_app.visitors import owner_of


def create_executors(settings: Settings) -> dict[str, Executor]:
    """Returns the executors of a server by name, the one for new runs first."""
    # Name, whether a server offers it, and what makes it.
    known: tuple[tuple[str, bool, Callable[[Settings], Executor]], ...] = (
        (zero_gpu.EXECUTOR, settings.zero_gpu, zero_gpu.ZeroGpuExecutor),
        (LOCAL, True, LocalExecutor),
        (hf_jobs.EXECUTOR, settings.space, hf_jobs.JobsExecutor),
    )
    return {name: create(settings) for name, offered, create in known if offered}


class Studio:
    """The parts that all pages of a server share; nothing here knows of Gradio.

    Attributes:
        settings: The same.
        store: All runs.
        summaries: What the list of runs says of each.
        queue: The runs that wait, and the one that is carried out.
        chat: The model that is talked to, if one is loaded.
        exports: What is taken along of runs.
        worker: A process that answers commands at once, once somebody has asked for one.
        planning_worker: Another one for memory plans, which take long; checks do not wait for them.
        answers: What both have answered lately.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for folder in (settings.runs, settings.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        self.store = RunStore(settings, create_executors(settings))
        self.summaries = Summaries()
        self.queue = RunQueue(settings, self.store)
        self.chat = ChatSessions(settings, self.queue.active)
        self.exports = ExportManager(settings, self.store, self.queue.active)
        self.worker = CommandWorker(settings)
        self.planning_worker = CommandWorker(settings)
        self.answers = AnswerCache()

    def owner(self, request: Any) -> str:
        """Returns who owns what this request starts."""
        return owner_of(request, self.settings.space)

    def run(self, request: Any, run_id: object) -> Run:
        """Returns a run. Raises UserError if there is none that who asks can see."""
        return self.store.get(self.owner(request), run_id)

    def start(self, owner: str, recipe: str, name: str) -> Run:
        """Queues a new run of a recipe, under a name that no other run of its owner has.

        Raises UserError if it cannot wait; then it is not kept.
        """
        run = self.store.create(owner, recipe, self.store.distinct_name(owner, name))
        try:
            self.queue.add(run)
        except Exception:
            self.store.erase(owner, run.id)
            raise
        return run

    def start_sweep(
        self, owner: str, content: dict[str, Any], name: str, request: SweepRequest
    ) -> Run:
        """Queues a sweep of a checked recipe; every value is checked before.

        Raises UserError if something is wrong, or it cannot wait; then it is not kept.
        """
        name = self.store.distinct_name(owner, name)
        run = self.store.create(owner, dump_yaml(content), name)
        try:
            run = self.store.update_metadata(run, command="sweep")
            prepare_sweep(run, content, request, self.worker, self.settings)
            return self.queue.add(run)
        except Exception:
            self.store.erase(owner, run.id)
            raise

    def close(self) -> None:
        """Ends what the server has started for itself. Runs go on without it."""
        self.chat.close()
        self.queue.close()
        self.worker.close()
        self.planning_worker.close()

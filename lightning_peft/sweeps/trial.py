"""One trial of a sweep, reported to Optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from lightning_peft.plugin.namespace import LateBoundCallback, bind_to_lightning
from lightning_peft.runs.session import RunSession

if TYPE_CHECKING:
    from optuna import Trial


class PruneTrial(LateBoundCallback):
    """Reports each validation to Optuna, and ends a run that its pruner gives up.

    optuna-integration's callback is for ``lightning.pytorch`` alone, and ends a run by an error.

    Args:
        trial: The trial.
        metric: Name of what is reported.

    Attributes:
        value: The value that was reported last.
        pruned: Whether the run was given up.
    """

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial, self.metric = trial, metric
        self.value: float | None = None
        self.pruned = False

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Reports the metric at this optimizer step."""
        found = trainer.callback_metrics.get(self.metric)
        if trainer.state.fn != "fit" or trainer.sanity_checking or found is None:
            return
        self.value = float(found)
        self.trial.report(self.value, trainer.global_step)
        if self.trial.should_prune():
            # As early stopping does: the step's checkpoint and the result are written.
            trainer.should_stop = self.pruned = True


class TrialSession(RunSession):
    """The run of a trial.

    Args:
        name: What the run is called.
        decided: What the first trial decided for arguments that are ``"auto"``.
        trial: Optuna's trial.
        metric: What it is judged by.
    """

    def __init__(self, name: str, decided: dict[str, Any], trial: Trial, metric: str) -> None:
        super().__init__("fit", name, decided)
        self.trial, self.metric = trial, metric
        self.progress: Any = None

    def begin(self, config: Namespace, recipe: str, root: str) -> list[Any]:
        """Adds the callback that reports to Optuna."""
        self.progress = bind_to_lightning(PruneTrial, root)(self.trial, self.metric)
        return [*super().begin(config, recipe, root), self.progress]

    def value(self) -> float | None:
        """The metric of the checkpoint that the run recommends; of a pruned one, the last."""
        if self.progress.pruned:
            return self.progress.value
        return None if self.result is None else self.result["after"].get(self.metric)

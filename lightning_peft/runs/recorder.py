"""Callback that writes the run folder."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch

from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import LateBoundCallback
from lightning_peft.plugin.optimization import log_info
from lightning_peft.runs.alerts import training_alert, validation_alert
from lightning_peft.runs.provenance import provenance
from lightning_peft.runs.record import RunRecord, numbers
from lightning_peft.runs.schedule import schedule_of, validation_rows

# Seconds between two updates of the status while steps are short.
UPDATE_EVERY = 0.5
# Below so many steps in all, every step is logged: a curve wants points.
SHORT_RUN = 100


class RunRecorder(RunRecord, LateBoundCallback):
    """Keeps the run folder of a Trainer's run up to date, from its first process.

    The command line adds it to every run; in Python it is
    ``Trainer(callbacks=[RunRecorder("runs/mine")])``.

    Args:
        folder: The run's folder, or its path.
        recipe: The config as it was resolved, for the record.
        kind: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        seed: What ``seed_everything`` was given.
        decided: What another run decided for arguments that are ``"auto"``, to decide the same.

    Attributes:
        before: Metrics of the first validation, before training: what the base can do.
        validations: Metrics of each validation while training, by optimizer step.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Gives checkpoints their place in the folder."""
        if trainer.is_global_zero and self.status is None:
            self._of_trainer = True
            self.open()
        if self._load is not None:
            self._load.device = trainer.strategy.root_device
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "dirpath", "") is None:
                callback.dirpath = str(self.folder.checkpoints)
        self._phase_ended("objects and data")
        self.update_status(phase="preparing model and data")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Writes what the run is made of, also for the adapters that it will save."""
        self._phase_ended("model, adapters and optimizers")
        if self.status is None:
            return
        facts = provenance(pl_module, trainer.datamodule, self.recipe, self.seed)
        if trainer.ckpt_path:
            self.decided.update(self.folder.decided())
        self._facts = facts
        self._write_provenance()
        prompts = getattr(trainer.datamodule, "prompts", None)
        if isinstance(prompts, dict):
            self.folder.write(self.folder.prompts, prompts)
        lifecycle = getattr(trainer.strategy, "lifecycle", None)
        if lifecycle is not None:
            # Decisions are taken from there, and new ones entered.
            lifecycle.decided = self.decided
            names = [n for n in ("recipe_sha256", "task", "data", "output_settings") if n in facts]
            lifecycle.provenance = {
                "run": self.folder.path.name,
                **{name: facts[name] for name in names},
            }

    def _write_provenance(self) -> None:
        """Writes the facts of the run with what was decided so far, where that has changed."""
        text = json.dumps(self.decided)
        if self.status is not None and text != self._written:
            self._written = text
            self.folder.write(self.folder.provenance, {**self._facts, "decided": self.decided})

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Says that the base is evaluated."""
        self.pace.validation_begins()
        self.update_status(phase="evaluating before training")

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the metrics of the base, if all of the validation rows were looked at."""
        # Fewer rows are a try of the code and no measurement; of a resumed run it is not a base.
        if trainer.num_sanity_val_steps == math.inf and not trainer.global_step:
            self.before = numbers(trainer.callback_metrics)
            self._log_metrics(trainer, self.before)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Says that training starts, and from where."""
        self._phase_ended("validation before training")
        total = trainer.estimated_stepping_batches
        steps = None if math.isinf(total) else int(total)
        if steps is not None and steps < SHORT_RUN:
            trainer.log_every_n_steps = 1
        # With gradients being accumulated, batches end without a step.
        self._seen_step = trainer.global_step
        self._accumulated = trainer.accumulate_grad_batches
        if trainer.global_step:
            self._remember()
        else:
            self.update_status(earlier_seconds=0.0, rows=0, tokens=0)
        self.pace.validation_ends(whole=trainer.num_sanity_val_steps == math.inf)
        self.pace.step(trainer.global_step)
        place = f" at step {trainer.global_step}" if trainer.global_step else ""
        self._event(trainer, "started", f"Training starts{place}.")
        # Whoever reads that it runs may interrupt it at once.
        for callback in self._interruptions(trainer):
            callback.listen()
        self.update_status(state="running", phase="training", total_steps=steps, part=None)

    def _remember(self) -> None:
        """Reads what was validated, and used, before the run was resumed."""
        if self.status is not None:
            known = self.status.status
            self.pace.rows, self.pace.tokens = known.rows, known.tokens
        for row in self.folder.rows(self.folder.metrics):
            for name in ("process_bytes", "cuda_bytes"):
                self._peaks[name] = max(self._peaks.get(name, 0), int(row.get(f"peak_{name}", 0)))
            metrics = {name: value for name, value in row.items() if name.startswith("val_")}
            if metrics and row["step"] == 0:
                self.before = metrics
            elif metrics:
                self.validations[row["step"]] = metrics

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends a validation, of which samples and checkpoints are part."""
        self.pace.validation_ends()
        if self.status is not None and self.status.status.part is not None:
            self.update_status(phase="training", part=None)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Notes the rate of the step and the norm of its gradients, where they will be logged."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
            norm = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
            rate = optimizer.param_groups[0]["lr"]
            self._of_step = {"learning_rate": float(rate), "grad_norm": float(norm)}

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the numbers of the step, and follows what other programs ask for."""
        self.pace.validation_ends(whole=False)
        if trainer.accumulate_grad_batches != self._accumulated:
            # Memory was short, or an epoch begins.
            self.pace.take_back()
            self._accumulated = trainer.accumulate_grad_batches
        self.pace.add(batch)
        self._write_provenance()
        self._follow_control(trainer)
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        self._first_step_ended(trainer)
        self.pace.step(step)
        if step % trainer.log_every_n_steps == 0:
            self._log_training(trainer)
        if time.monotonic() - self._updated > UPDATE_EVERY:
            self._report_progress(trainer)

    def _first_step_ended(self, trainer: Any) -> None:
        if self.start_times is not None and trainer.global_step:
            self._phase_ended("first step")
            log_info(trainer.strategy, self.start_times.table())
            self.start_times = None

    def _log_training(self, trainer: Any) -> None:
        values = numbers(trainer.callback_metrics, of="train")
        self._rates = {f"{name}_per_second": rate for name, rate in self.pace.rates().items()}
        memory = {f"peak_{name}": value for name, value in self._peak().items()}
        self._log_metrics(trainer, {**values, **self._of_step, **self._rates, **memory})
        if "train_loss" in values:
            self._losses.append(values["train_loss"])
            self._alert(trainer, training_alert(self._losses))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Says that validation runs."""
        if not trainer.sanity_checking:
            self.pace.validation_begins()
            self._report_progress(trainer, phase="validating")

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Says how far a validation is, and follows what other programs ask for."""
        known = validation_rows(trainer, dataloader_idx)
        part = {"unit": "batches", "done": batch_idx, "of": trainer.num_val_batches}
        if known is not None:
            part = {"unit": "rows", "done": min(batch_idx * known[0], known[1]), "of": known[1]}
        elif trainer.sanity_checking:
            part["of"] = trainer.num_sanity_val_batches
        if isinstance(part["of"], list):
            part["of"] = part["of"][dataloader_idx]
        self.on_validation_part(trainer, **part)

    def on_validation_part(self, trainer: Any, unit: str, done: int, of: float) -> None:
        """Says which part of a phase begins, and follows what other programs ask for.

        ``of`` is infinite where the number of parts is not known.
        """
        if not trainer.sanity_checking:
            self._follow_control(trainer)
        sampling = unit == "samples"
        if sampling:
            # Those of the base come between two steps.
            self._first_step_ended(trainer)
            self.pace.validation_begins()
        if time.monotonic() - self._updated > UPDATE_EVERY or sampling:
            total = int(of) if math.isfinite(of) else None
            named = sampling and not trainer.sanity_checking
            phase = {"phase": "generating samples"} if named else {}
            self._report_progress(trainer, part={"unit": unit, "done": done, "of": total}, **phase)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the numbers of the validation."""
        if trainer.sanity_checking:
            return
        metrics = numbers(trainer.callback_metrics, of="val")
        self._log_metrics(trainer, metrics)
        if trainer.state.fn != "fit":
            return
        self.validations[trainer.global_step] = metrics
        # Checkpoint callbacks come after the others, so the adapter they save knows its metrics.
        lifecycle = getattr(trainer.strategy, "lifecycle", None)
        if lifecycle is not None:
            lifecycle.provenance = {
                **lifecycle.provenance,
                "metrics": {"before": self.before, "after": metrics},
            }
        losses = [row["val_loss"] for row in self.validations.values() if "val_loss" in row]
        self._alert(trainer, validation_alert(losses))
        self._report_progress(trainer, phase="training", part=None)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the numbers of the test."""
        self._log_metrics(trainer, numbers(trainer.callback_metrics))

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes predictions, one line per row, where JSON can hold them."""
        rows = outputs if isinstance(outputs, list) else [{"prediction": outputs}]
        for row in rows:
            content = row if isinstance(row, dict) else {"prediction": row}
            self.folder.append(
                self.folder.predictions, json.loads(json.dumps(content, default=_plain))
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Writes the last numbers."""
        self._report_progress(trainer, phase="training is done")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Says what ended the run."""
        self.fail(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the record, unless it was begun by another than the Trainer."""
        if self._of_trainer and self.status is not None:
            saved = [one.saved for one in self._interruptions(trainer) if one.saved]
            if saved:
                self.stopped(saved[0])
            else:
                self.finish(trainer, pl_module, numbers(trainer.callback_metrics))
            self.close()

    def _report_progress(self, trainer: Any, **changes: Any) -> None:
        if self.status is None:
            return
        self._updated = time.monotonic()
        step, total = trainer.global_step, self.status.status.total_steps
        eta = None
        if total is not None:
            schedule = schedule_of(trainer)
            more = schedule.until(total) - schedule.until(step) if schedule is not None else 0
            eta = self.pace.eta(max(0, total - step), more)
        self.update_status(
            step=step,
            epoch=trainer.current_epoch,
            steps_per_second=self.pace.rates().get("steps"),
            eta_seconds=eta,
            eta_at=time.time(),
            rows=self.pace.rows,
            tokens=self.pace.tokens,
            checkpoint=self._newest(),
            **changes,
        )

    def _follow_control(self, trainer: Any) -> None:
        """Passes on what another program requests in ``control.json``: stop, or save now."""
        if self.status is None:
            return
        try:
            request = json.loads(self.folder.control.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        self.folder.control.unlink(missing_ok=True)
        if request.get("stop"):
            self.update_status(state="stopping", phase="stopping after this step")
        for callback in self._interruptions(trainer):
            callback.request(stop=bool(request.get("stop")), save=bool(request.get("save_now")))

    def _interruptions(self, trainer: Any) -> list[Any]:
        return [callback for callback in trainer.callbacks if isinstance(callback, SaveOnInterrupt)]


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return str(value)

"""Reference model of preference tuning: the same model with adapters disabled."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_peft import engine
from lightning_peft.errors import ConfigError, itemize
from lightning_peft.tasks.preference_losses import answer_log_probabilities
from lightning_peft.tasks.pretrained import PretrainedTask

log = logging.getLogger(__name__)

# Nats per answer, far above rounding.
_NOTICEABLE = 0.01


class ReferencedTask(PretrainedTask):
    """A causal language model that is compared with itself, without its adapters."""

    auto_class = AutoModelForCausalLM
    _start_checked = False

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs a reference."""
        return True

    @property
    @abstractmethod
    def title(self) -> str:
        """The class and its loss, for messages."""

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each row's answer in nats, ``(rows,)``, and its tokens."""
        output = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return answer_log_probabilities(output.logits, batch["labels"])

    def reference_answers(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the log-probability that the reference gives each row's answer, ``(rows,)``."""
        with reference(self):
            return self.answers(batch)[0]

    def on_fit_start(self) -> None:
        """Checks that there is a reference, and puts the model in train mode."""
        if self.has_reference:
            check_reference(self)
        super().on_fit_start()

    def on_validation_start(self) -> None:
        """Checks that there is a reference, and the tokens of the data."""
        if self.has_reference:
            check_reference(self)
        super().on_validation_start()

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Says so once if training does not begin at the reference, on its first batch."""
        known, self._start_checked = self._start_checked, True
        if known or not self.has_reference or self.trainer.global_step:
            return
        assert self.model is not None
        plugin: Any = self.trainer.precision_plugin
        with torch.no_grad(), engine.in_eval_mode(self.model), plugin.forward_context():
            apart = (self.answers(batch)[0] - self.reference_answers(batch)).abs().mean()
        if apart > _NOTICEABLE:
            log.warning(
                "The adapters have learnt something already: answers are %.2f nats from the "
                "reference before the first step, which is the base without them. If they are to "
                "be the reference, merge them into the base first.",
                apart,
            )


@contextmanager
def reference(task: Any) -> Iterator[None]:
    """Runs the body with the base alone: what trains is put back to what it was, for a while."""
    with torch.no_grad(), engine.in_eval_mode(task.model), engine.disable_adapters(task):
        yield


def check_reference(task: Any) -> None:
    """Refuses a reference that would be something else than the base."""
    name = task.title
    record = engine.record_of(task)
    if record is None:
        raise ConfigError(
            f"{name} needs adapters: its reference is the base with the adapters off, and without "
            "any the trained model would be compared with itself. Train with strategy='lora' or "
            "'qlora', or with LoRACallback; or take a loss that needs no reference, such as "
            "PreferenceTuning's loss='orpo' or loss_type='simpo'."
        )
    problems = moving_base(task)
    if problems:
        raise ConfigError(f"{name} would have no fixed reference:" + itemize(problems))


def moving_base(task: Any) -> list[str]:
    """Returns why a module with its adapters off is not the base, or would not stay it."""
    problems = []
    record = engine.require_record(task)
    parts = [(task.get_submodule(entry.name), entry) for entry in record.parts.values()]
    rewritten = [entry.name for _, entry in parts if entry.changed_base is not None]
    if rewritten:
        inits = {i.config.get("init_lora_weights") for _, e in parts for i in e.adapters.values()}
        problems.append(
            f"init_lora_weights={', '.join(sorted(map(str, inits)))} moved a part of the weights "
            f"of {', '.join(rewritten)} into the adapters: with them off, that part is missing. "
            "Use an initialisation that leaves the base alone, such as True"
        )
    known = {id(p) for part, e in parts for p in engine.trained_parameters(part, e).values()}
    named = task.named_parameters()
    others = [name for name, p in named if p.requires_grad and id(p) not in known]
    if others:
        problems.append(
            f"{len(others)} tensors train that are not adapters, such as {others[0]!r}: they would "
            "change the reference as well. Freeze them, adapt the whole model, or name them in "
            "modules_to_save"
        )
    return problems

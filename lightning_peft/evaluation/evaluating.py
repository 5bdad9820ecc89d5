"""Harness runs on one loaded model: base first, then each adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
import transformers
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.models.huggingface import HFLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.errors import ConfigError, UnsupportedError, first_line
from lightning_peft.evaluation.harness_package import harness_version
from lightning_peft.evaluation.results import table_rows, task_hashes
from lightning_peft.evaluation.tasks import HARNESS_SEEDS, Seeds, TaskSet
from lightning_peft.export.adapters import Adapter
from lightning_peft.export.base import Base

# On a CPU, the harness' own search for the largest batch fills the memory with the longest texts.
CPU_BATCH_SIZE = 8
# What is done, and how much of it of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How tasks are evaluated; the names and defaults are the harness'.

    Attributes:
        batch_size: Requests at a time; ``None`` for the most that fit on a GPU, 8 on a CPU.
        limit: First rows of each task that are taken; a share of them if below 1.
        num_fewshot: Solved examples before each question; ``None`` for what each task specifies.
        apply_chat_template: Write questions as turns of a conversation.
        system: System turn, or text before the questions without a template.
        seeds: Of the random number generators.
    """

    batch_size: int | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    system: str | None = None
    seeds: Seeds = HARNESS_SEEDS


def check_language_model(base: Base, adapters: Sequence[Adapter]) -> None:
    """Refuses models that are not language models."""
    generating = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }
    trained_on = {adapter.name: adapter.base.get("class") for adapter in adapters}
    listed = getattr(base.config, "architectures", None) or [None]
    kinds = trained_on if any(trained_on.values()) else {base.name: listed[0]}
    for name, kind in kinds.items():
        if kind is not None and hasattr(transformers, kind) and kind not in generating:
            raise UnsupportedError(
                f"{name} is a {kind}, and the harness' tasks are for language models, which give "
                "texts a probability. Evaluate it on its own data: lightning-peft test."
            )


def evaluate(
    chat_model: ChatModel,
    tasks: TaskSet,
    settings: Settings,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Returns the results of the base and of every adapter on the same prompts."""
    lm = _harness_model(chat_model, settings)
    found = {}
    for name in chat_model.names:
        chat_model.switch(name)
        lm.report_to(progress, name)
        if settings.apply_chat_template:
            lm.tokenizer.chat_template = chat_model.template().text
            lm.chat_template_args = chat_model.variables()
        with chat_model.activated():
            found[name] = _run(lm, tasks, settings)
    facts, template_notes = _task_facts(tasks, found), _template_notes(chat_model, settings)
    return {
        "evaluated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "harness": {"package": "lm_eval", "version": harness_version()},
        "compared": chat_model.names,
        "adapters": [_adapter_facts(adapter) for adapter in chat_model.adapters],
        "settings": _settings_used(chat_model, lm, tasks, settings),
        "tasks": facts,
        "results": table_rows(found),
        "notes": [
            *chat_model.loaded.notes,
            *tasks.notes,
            *template_notes,
            *_prompt_notes(chat_model.names, facts),
        ],
    }


def _harness_model(chat_model: ChatModel, settings: Settings) -> HarnessModel:
    model, size = chat_model.loaded.model, settings.batch_size
    automatic = "auto" if model.device.type == "cuda" else CPU_BATCH_SIZE
    return HarnessModel(model, chat_model.loaded.tokenizer, size or automatic)


def _run(lm: HarnessModel, tasks: TaskSet, settings: Settings) -> dict[str, Any]:
    settings.seeds.set()
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=settings.seeds.fewshot)
    try:
        found: dict[str, Any] = run_harness(
            lm=lm,
            task_dict=tasks.loaded,
            limit=settings.limit,
            system_instruction=settings.system,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=True,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The device has no memory for batches of {lm.batch_size}: {first_line(error)} Give "
            "a smaller --batch-size."
        ) from error
    # A task is code and data of others, which may raise anything at any row.
    except Exception as error:
        names, kind = ", ".join(tasks.loaded["tasks"]), type(error).__name__
        raise ConfigError(
            f"The harness cannot evaluate {names} on this model: {first_line(error)} ({kind})"
        ) from error
    return found


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "folder": str(adapter.folder.resolve()),
        "sha256": adapter.facts.get("adapter_sha256"),
        "base": adapter.base_name,
        "base_revision": adapter.base_revision,
        "base_fingerprint": adapter.base.get("fingerprint"),
    }


def _settings_used(
    chat_model: ChatModel, lm: HarnessModel, tasks: TaskSet, settings: Settings
) -> dict[str, Any]:
    model, seeds = chat_model.loaded.model, settings.seeds
    return {
        "tasks": tasks.requested,
        "base": model.name_or_path,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "batch_size": lm.batch_size,
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "apply_chat_template": settings.apply_chat_template,
        "chat_template": lm.tokenizer.chat_template if settings.apply_chat_template else None,
        "chat_template_kwargs": lm.chat_template_args if settings.apply_chat_template else None,
        "system": settings.system,
        "seeds": asdict(seeds),
    }


def _task_facts(tasks: TaskSet, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first = next(iter(found.values()))
    hashes = {name: task_hashes(one) for name, one in found.items()}
    return {
        name: {
            "version": _plain(first["versions"].get(name)),
            "num_fewshot": first["n-shot"].get(name),
            "rows": dict(first["n-samples"][name]),
            "hash": {model: by_task[name] for model, by_task in hashes.items()},
            "data_files": tasks.data_files.get(name, {}),
        }
        for name in tasks.loaded["tasks"]
    }


def _plain(version: Any) -> Any:
    """Returns a version as JSON holds it: YAML reads ``2024-05-01`` as a date."""
    return version if isinstance(version, int | float | None) else str(version)


def _prompt_notes(names: Sequence[str], facts: dict[str, Any]) -> list[str]:
    """Returns whose prompts are not those of the base, which is asked as the first adapter."""
    base, *adapters = names
    notes = []
    for name in adapters:
        other = [task for task, one in facts.items() if one["hash"][name] != one["hash"][base]]
        if other:
            notes.append(
                f"{name} was asked with other prompts than the base, which was asked as "
                f"{adapters[0]}, in {', '.join(other)}: the difference is that of the prompts too. "
                "One --chat-template for all, or one adapter at a time, compares the same prompts"
            )
    return notes


def _template_notes(chat_model: ChatModel, settings: Settings) -> list[str]:
    if settings.apply_chat_template:
        return []
    names = [adapter.name for adapter in chat_model.adapters if adapter.chat_template]
    return [
        f"{name} was trained with a chat template, and the questions were written without one: "
        "--apply-chat-template writes them as turns"
        for name in names
    ]


class HarnessModel(HFLM):
    """Transformers model that reports its progress."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str) -> None:
        """Takes a model in eval mode, on its device; ``batch_size`` may be ``"auto"``."""
        with _as_it_is(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._progress: Progress = lambda what, done, total: None
        self._what, self._done, self._total = "", 0, 0
        self.set_cache_hook(self)

    def report_to(self, progress: Progress, what: str) -> None:
        """Calls ``progress`` from now on, with ``what`` before the kind of requests."""
        self._progress, self._what = progress, what

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Is called by the harness for each answered request, as that of a cache."""
        self._done += 1
        self._progress(f"{self._what}: {attr}", self._done, self._total)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the log-likelihood of its text, and whether it is greedy."""
        self._done, self._total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the log-likelihood of its whole text."""
        self._done, self._total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """Returns for each request the generated text."""
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """The harness ties weights once more, which would undo a head in ``modules_to_save``.

    It also warns that a model was given instead of a name, which is meant.
    """
    log = logging.getLogger("lm_eval.models.huggingface")
    before = log.level
    log.setLevel(logging.ERROR)
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights
        log.setLevel(before)

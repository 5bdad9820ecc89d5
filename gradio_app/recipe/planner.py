"""Memory plan of a recipe through ``lightning-peft plan``, and changes that make it fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.recipe.command_worker import CommandResult
from gradio_app.recipe.content import value_at, with_value
from gradio_app.recipe.edits import with_method
from gradio_app.recipe.form import method_of
from gradio_app.recipe.model_files import is_cached
from gradio_app.recipe.presets import GPUS, MODELS, THIS_MACHINE
from gradio_app.recipe.preview import error_message, local_path
from lightning_peft.task_registry import task_of_config

SECONDS = 120.0
# Where neither the recipe nor the data determines the length of rows.
DEFAULT_LENGTH = 512
_AMOUNT = re.compile(r"\d{1,4}(\.\d{1,3})?\s?[GM]i?B", re.IGNORECASE)
_STRATEGY = "trainer.strategy.init_args."
_LENGTH = "data.init_args.max_length"
_BATCH, _ACCUMULATE = "data.init_args.batch_size", "trainer.accumulate_grad_batches"
RunCommand = Callable[[list[str]], CommandResult]
_PRECISIONS = ("32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Plan:
    """What a run needs: the numbers of ``plan --json``, for so many tokens in a row.

    ``length_source`` is ``"set"``, ``"data"`` or ``"usual"``. Without numbers, ``refusal`` is the
    key of a text that explains it, and ``reason`` the message of the command.
    """

    numbers: dict[str, Any]
    length: int = 0
    length_source: str = ""
    refusal: str = ""
    reason: str = ""

    @property
    def required_bytes(self) -> int:
        """Bytes at the fullest moment."""
        return int(self.numbers.get("peak_bytes", 0))

    @property
    def available_bytes(self) -> int | None:
        """Bytes of the device."""
        device = self.numbers.get("device")
        return int(device["bytes"]) if device else None

    @property
    def fits(self) -> bool | None:
        """Whether it fits for sure; ``None`` where that is not known."""
        found = self.numbers.get("fits")
        return None if found is None else bool(found)


@dataclass(frozen=True)
class Fix:
    """A change that needs less memory, and the plan with it.

    It is ``"qlora"``, ``"checkpointing"``, ``"batch"``, ``"length"`` or ``"all"``.
    """

    name: str
    plan: Plan


def validate_device(text: object) -> str:
    """Returns the device that a visitor named, if it is a GPU of the list or an amount."""
    name = text.strip() if isinstance(text, str) else ""
    if name in (THIS_MACHINE, *GPUS) or _AMOUNT.fullmatch(name):
        return name
    raise UserError("checks.device", name=shortened(text))


def plan_arguments(content: dict[str, Any], device: str, length: int) -> list[str] | str:
    """Returns the arguments of the command, or the key of a text that explains why not."""
    task = task_of_config(content)
    model = value_at(content, "model.init_args.model", None)
    if task is None or not task.sequences_per_row or model is None:
        return "plan_not_this_task"
    if value_at(content, "model.init_args.config", None) is not None:
        return "plan_not_random"
    if value_at(content, "model.init_args.trust_remote_code", None):
        # Planning builds the model, and only the run itself may run its code.
        return "plan_not_own_code"
    batch = value_at(content, _BATCH, 8) * task.sequences_per_row
    precision = value_at(content, "trainer.precision", None)
    strategy = {
        name: value_at(content, _STRATEGY + name, None)
        for name in ("r", "optimizer", "gradient_checkpointing", "target_modules")
    }
    revision = value_at(content, "model.init_args.revision", None)
    checkpointing = strategy["gradient_checkpointing"]
    words = {
        "model": str(planned_place(str(model))),
        "method": method_of(content),
        "seq-len": length,
        "batch-size": batch,
        "accumulate": value_at(content, _ACCUMULATE, 1),
        "gpu": device,
        "r": strategy["r"] or 16,
        "precision": precision if precision in _PRECISIONS else "32-true",
        "dtype": value_at(content, "model.init_args.dtype", "auto"),
        "gradient-checkpointing": {True: "on", False: "off"}.get(checkpointing, "auto"),
        "optimizer": strategy["optimizer"] or "auto",
        "logits": task.logits,
    }
    made = ["plan", "--json", *(f"--{name}={value}" for name, value in words.items())]
    made += [f"--revision={revision}"] if revision else []
    targets = strategy["target_modules"]
    if targets:
        made += ["--target-modules", *(targets if isinstance(targets, list) else [targets])]
    return made


def planned_place(model: str) -> Path:
    """Returns where the sizes of a model are read: of a listed one, even before its download."""
    listed = next((one for one in MODELS if one.name == model), None)
    if listed is not None and listed.shape is not None and not is_cached(model):
        return listed.shape
    return local_path(model)


def plan_memory(
    content: dict[str, Any], device: str, ask: RunCommand, longest: int | None = None
) -> Plan:
    """Returns the memory plan of a checked recipe for a device; ``ask`` runs the command."""
    length, length_source = length_of(content, longest)
    words = plan_arguments(content, device, length)
    if isinstance(words, str):
        return Plan({}, length, length_source, refusal=words)
    answer = ask([*words, "--no-limits"])
    numbers = answer.json() if answer.code == 0 else None
    if numbers is None:
        return Plan({}, length, length_source, refusal="plan_failed", reason=error_message(answer))
    return Plan(numbers, length, length_source)


def length_of(content: dict[str, Any], longest: int | None) -> tuple[int, str]:
    """Returns how many tokens rows are planned with, and where that is from."""
    most = value_at(content, _LENGTH, None)
    if longest is not None:
        return (min(longest, most), "data") if most else (longest, "data")
    return (most, "set") if most else (DEFAULT_LENGTH, "usual")


def with_fix(content: dict[str, Any], name: object, longest: int | None) -> dict[str, Any]:
    """Returns a recipe that needs less memory. Raises UserError if the change does not exist."""
    if name == "qlora":
        return with_method(content, "qlora")
    if name == "checkpointing":
        return with_value(content, f"{_STRATEGY}gradient_checkpointing", True)
    if name == "batch":
        rows = value_at(content, _BATCH, 8) * value_at(content, _ACCUMULATE, 1)
        content = with_value(content, _BATCH, 1)
        return with_value(content, _ACCUMULATE, rows)
    if name == "length":
        length, _ = length_of(content, longest)
        content = with_value(content, _LENGTH, max(64, length // 2))
        return with_value(content, "data.init_args.over_long", "truncate")
    if name == "all":
        for one in applicable_fixes(content, longest):
            content = with_fix(content, one, longest)
        return content
    raise UserError("checks.no_fix", name=shortened(name))


def applicable_fixes(content: dict[str, Any], longest: int | None) -> list[str]:
    """Returns the names of the changes that would need less memory, the mildest first."""
    found = []
    quantized = method_of(content) == "qlora"
    # Where it is left open, a run switches it on by itself.
    if value_at(content, f"{_STRATEGY}gradient_checkpointing", None) is False:
        found.append("checkpointing")
    if value_at(content, _BATCH, 8) > 1:
        found.append("batch")
    if not quantized:
        found.append("qlora")
    if length_of(content, longest)[0] > 128:
        found.append("length")
    return found


def find_fixes(
    content: dict[str, Any], device: str, ask: RunCommand, longest: int | None
) -> Iterator[Fix]:
    """Yields changes with what the run would then need, as each is known; last all together."""
    names = applicable_fixes(content, longest)
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        plan = plan_memory(with_fix(content, name, longest), device, ask, longest)
        if plan.numbers:
            yield Fix(name, plan)

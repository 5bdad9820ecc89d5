"""Edits of a recipe: task, model, data, method and training length."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.recipe.content import MISSING, data_of, merge_recipes, value_at, with_value
from gradio_app.recipe.fields import FIELDS
from gradio_app.recipe.form import method_of
from gradio_app.recipe.precision import Precision, default_precision, detect_bfloat16
from gradio_app.recipe.presets import AMOUNTS, DEMO_BASE, MODELS
from gradio_app.recipe.yaml_text import dump_yaml, parse_yaml
from gradio_app.redaction import Redactor
from gradio_app.settings import Settings
from lightning_peft.demo.real_base import SMOLLM2_PLACE, absence_of_smollm2
from lightning_peft.recipe_files import recipe_files
from lightning_peft.task_registry import TASKS, TaskSpec, task_of_config

METHODS = {"lora": "lightning_peft.LoRAStrategy", "qlora": "lightning_peft.QLoRAStrategy"}
_MODEL, _DATA = "model.init_args.", "data.init_args."
_STRATEGY = "trainer.strategy.init_args."
# What a small trial sets for its own data, and for its own model.
_SMALL_DATA_PATHS = (
    *(f"{_DATA}{name}" for name in ("columns", "validation_share", "test_share", "max_length")),
    *(f"{_DATA}{name}" for name in ("max_target_length", "over_long", "time", "season")),
    *("trainer.limit_train_batches", "trainer.limit_val_batches"),
)
_SMALL_MODEL_PATHS = (
    *(f"{_MODEL}{name}" for name in ("learning_rate", "config", "generate_limit")),
    *(f"{_MODEL}{name}" for name in ("max_new_tokens", "max_completion_length", "checkpoint")),
    *(f"{_DATA}{name}" for name in ("chat_template", "feature_extractor")),
    f"{_DATA}processor_config",
)
# What is said of the files themselves.
_FILE_ARGUMENTS = ("encoding", "delimiter", "sheet", "text_unit", "validation_data", "test_data")
# What a preset of epochs, rank and learning rate sets.
_AMOUNT_PATHS = (
    *("trainer.max_epochs", f"{_STRATEGY}r", f"{_STRATEGY}lora_alpha", f"{_MODEL}learning_rate"),
)
_HUB_ARGUMENTS = ("hub_config", "hub_splits", "hub_revision")
_SHARED_PATHS = (
    *("trainer.max_epochs", "trainer.accumulate_grad_batches", "trainer.val_check_interval"),
    *("trainer.check_val_every_n_epoch", "trainer.log_every_n_steps"),
)


def load_recipe(name: object) -> dict[str, Any]:
    """Returns a recipe; one for small trials is laid over the recipe that it belongs to."""
    if not isinstance(name, str) or name not in _files():
        raise UserError("checks.no_recipe", name=shortened(name))
    content = load_recipe_file(name)
    small = name.removeprefix("small/")
    if small == name:
        return content
    task = small if small in TASKS else small.partition("-")[0]
    return merge_recipes(load_recipe(f"{task}-lora"), content)


def base_recipe(task: object, method: str = "lora", small: bool = True) -> dict[str, Any]:
    """Returns the recipe of a task; the small trial has a model and data that are here already."""
    if not isinstance(task, str) or task not in TASKS or method not in METHODS:
        raise UserError("checks.no_recipe", name=shortened(task))
    content = load_recipe(f"{task}-{method}")
    if not small:
        return content
    return merge_recipes(content, load_recipe_file(f"small/{task}"))


def first_recipe() -> dict[str, Any]:
    """Returns the recipe of a new run: chats with SmolLM2 where it is installed, else the toy."""
    content = base_recipe("sft")
    return content if absence_of_smollm2() else with_model(content, SMOLLM2_PLACE, None)


def demo_recipe() -> str:
    """Returns the recipe of the first card, as YAML: a QLoRA run that needs no network.

    Its model is the real one of ``lightning-peft demo`` where that is installed, else the toy.
    """
    small = "small/sft" if absence_of_smollm2() else "small/sft-orders"
    content = merge_recipes(load_recipe("sft-qlora"), load_recipe_file(small))
    return f"# The recipe sft-qlora with {small}.\n" + dump_yaml(content)


def load_recipe_file(name: str) -> dict[str, Any]:
    """Returns the content of a recipe's own file."""
    return copy.deepcopy(_in_file(name))


# The form needs them after each change of a setting, and files of the package stay as they are.
_files = cache(recipe_files)


@cache
def _in_file(name: str) -> dict[str, Any]:
    return parse_yaml(_files()[name].read_text(encoding="utf-8"))


def recipe_of_run(content: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Returns the recipe of a run as one to start from: without what belonged to that run."""
    for key in ("default_root_dir", "logger", "enable_progress_bar"):
        content = with_value(content, f"trainer.{key}", MISSING)
    for part in (_MODEL, _DATA):
        content = with_value(content, f"{part}cache_dir", MISSING)
        arguments = value_at(content, part.rstrip("."), None)
        for key, value in arguments.items() if isinstance(arguments, dict) else ():
            if isinstance(value, str):
                # The file that the run wrote skipped rows to is not written over.
                own = Path(value).name if key == "skip_bad_rows" else value
                arguments[key] = Redactor(settings).portable(own)
    return content


def with_model(content: dict[str, Any], model: str, revision: str | None) -> dict[str, Any]:
    """Returns the recipe for another model, checked, with the settings that go with its size.

    The example is the data of a small trial. A model of the visitor's own does not take it over:
    then no data is chosen, until the visitor does so.
    """
    before = value_at(content, _MODEL + "model", None)
    task = task_of_config(content) or TASKS["sft"]
    content = with_value(content, _MODEL + "revision", revision or MISSING)
    if revision is None or model != before:
        content = with_value(content, _MODEL + "trust_remote_code", MISSING)
    if model == before and value_at(content, _MODEL + "config", None) is None:
        return _read_at(content, task.processor_argument, model, revision)
    small, trial = model == DEMO_BASE, _is_small(content)
    source = base_recipe(task.name, method_of(content), small)
    content = _copy_values(source, content, _SMALL_MODEL_PATHS)
    content = with_value(
        content, "trainer.precision", default_precision(task.name, small, detect_bfloat16()).value
    )
    if small is not trial:
        content = _copy_values(source, content, _SHARED_PATHS)
    content = with_value(content, _MODEL + "model", model)
    if task.processor_argument is not None:
        content = with_value(content, _DATA + task.processor_argument, model)
    content = _read_at(content, task.processor_argument, model, revision)
    example = data_of(base_recipe(task.name))
    if small and not data_of(content):
        return with_data(content, example)
    if trial and not small and data_of(content) == example:
        return with_data(content, None)
    return content


def with_task(content: dict[str, Any], name: object) -> dict[str, Any]:
    """Returns the recipe of another task, with model and data kept where the task takes them.

    A model is kept where it is offered for both tasks, or both train the same class of model; data
    where both take rows of the same shapes. Settings that both have and that were not changed are
    those of the other task.
    """
    other = base_recipe(name, method_of(content))
    before, after = task_of_config(content), TASKS[str(name)]
    if before is None or before.name == after.name:
        return other
    model = value_at(content, _MODEL + "model", None)
    if isinstance(model, str) and _model_fits_task(model, before, after):
        revision = value_at(content, _MODEL + "revision", None)
        other = with_model(other, model, revision)
    if set(before.shapes) & set(after.shapes):
        place = data_of(content)
        if place and place != data_of(base_recipe(before.name)):
            named = {key: value_at(content, _DATA + key, None) for key in _HUB_ARGUMENTS}
            other = with_data(other, place, **named)
            for key in _FILE_ARGUMENTS:
                value = value_at(content, _DATA + key, MISSING)
                other = other if value is MISSING else with_value(other, _DATA + key, value)
    return other


def _model_fits_task(model: str, before: TaskSpec, after: TaskSpec) -> bool:
    known = next((one for one in MODELS if one.name == model), None)
    if known is not None:
        return after.family in known.families
    # What a model of the visitor's own can do is known by what it was chosen for.
    return bool(before.family) and before.family == after.family


def _read_at(
    content: dict[str, Any], reads: str | None, model: str, revision: str | None
) -> dict[str, Any]:
    """Returns the recipe with the model's own tokenizer or processor at the same revision."""
    if reads is None or value_at(content, _DATA + reads, None) != model:
        return content
    return with_value(content, f"{_DATA}{reads}_revision", revision or MISSING)


def with_data(content: dict[str, Any], data: str | None, **hub: Any) -> dict[str, Any]:
    """Returns the recipe for other rows, without the settings that described the rows before.

    ``data`` has been checked; ``None`` for nothing yet. ``hub`` holds ``hub_config``,
    ``hub_splits`` and ``hub_revision`` of a data set on the hub.
    """
    task = task_of_config(content) or TASKS["sft"]
    before = data_of(content)
    for name in _HUB_ARGUMENTS:
        content = with_value(content, _DATA + name, hub.get(name) or MISSING)
    if data == before or not data and not before:
        return content
    for name in ("validation_data", "test_data"):
        content = with_value(content, _DATA + name, MISSING)
    example = data_of(base_recipe(task.name))
    own = data != example
    source = base_recipe(task.name, small=not own)
    content = _copy_values(source, content, _SMALL_DATA_PATHS)
    if own is not (before != example):
        content = _copy_values(source, content, ("trainer.max_epochs",))
    return with_value(content, _DATA + "data", data or MISSING)


def precision_of(content: dict[str, Any]) -> Precision:
    """Returns the default precision for a recipe's task and model on this machine."""
    task = task_of_config(content)
    return default_precision(task.name if task else "", _is_small(content), detect_bfloat16())


def _is_small(content: dict[str, Any]) -> bool:
    model = value_at(content, _MODEL + "model", None)
    return model == DEMO_BASE or value_at(content, _MODEL + "config", None) is not None


def _copy_values(
    source: Mapping[str, Any], content: dict[str, Any], paths: tuple[str, ...]
) -> dict[str, Any]:
    for path in paths:
        value = value_at(source, path, MISSING)
        if value is not MISSING or value_at(content, path, MISSING) is not MISSING:
            content = with_value(content, path, value)
    return content


def with_method(content: dict[str, Any], method: object) -> dict[str, Any]:
    """Returns the recipe with LoRA or QLoRA; what only one of them takes is left out."""
    if not isinstance(method, str) or method not in METHODS:
        raise UserError("checks.no_method", name=shortened(method))
    if method == method_of(content):
        return content
    strategy = value_at(content, "trainer.strategy", None)
    arguments = strategy.get("init_args") if isinstance(strategy, dict) else None
    dropped = {field.path.rpartition(".")[2] for field in FIELDS if field.method == "qlora"}
    # Both have their own default.
    dropped |= {"optimizer", "gradient_checkpointing"}
    kept = {key: value for key, value in (arguments or {}).items() if key not in dropped}
    made = {"class_path": METHODS[method], "init_args": kept}
    return with_value(content, "trainer.strategy", made)


def with_amount(content: dict[str, Any], amount: object) -> dict[str, Any]:
    """Returns the recipe with epochs, rank and learning rate of a preset."""
    if not isinstance(amount, str) or amount not in AMOUNTS:
        raise UserError("checks.no_amount", name=shortened(amount))
    epochs, rank, factor = AMOUNTS[amount]
    values = (epochs, rank, 2 * rank, default_learning_rate(content) * factor)
    for path, value in zip(_AMOUNT_PATHS, values, strict=True):
        content = with_value(content, path, value)
    return content


def amount_of(content: dict[str, Any]) -> str | None:
    """Returns the preset that a recipe's settings are those of, if they are one's."""

    def settings(one: dict[str, Any]) -> list[Any]:
        return [value_at(one, path, None) for path in _AMOUNT_PATHS]

    return next(
        (name for name in AMOUNTS if settings(with_amount(content, name)) == settings(content)),
        None,
    )


def default_learning_rate(content: dict[str, Any]) -> float:
    """Returns the learning rate of the recipe for this task, and for a model of this size."""
    task = task_of_config(content)
    name = task.name if task else "sft"
    source = base_recipe(name, small=_is_small(content))
    return float(value_at(source, f"{_MODEL}learning_rate", 2e-4))


def limit_steps(content: dict[str, Any], steps: int = 5) -> dict[str, Any]:
    """Returns the same run, ended after a few steps."""
    content = with_value(content, "trainer.max_steps", steps)
    # Each step is timed, so that it is known how long the whole run takes.
    return with_value(content, "trainer.log_every_n_steps", 1)

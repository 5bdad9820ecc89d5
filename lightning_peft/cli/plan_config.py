"""Conversion of a recipe to arguments of ``lightning-peft plan``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning_peft import engine
from lightning_peft.errors import ConfigError, LightningPeftError, first_line
from lightning_peft.recipe_files import resolved_recipes
from lightning_peft.task_registry import task_of_config

# Rows with images that are read to find a long one: each image is opened and processed.
_ROWS = 200
_COLUMNS = ["length", "image_starts", "image_ends"]
_METHODS = {"QLoRA": "qlora", "qlora": "qlora", "LoRA": "lora", "lora": "lora"}


def plan_from_config(
    configs: Sequence[str], overrides: Sequence[str], length: bool = True
) -> list[str]:
    """Returns the arguments of the command for the run of a config.

    With ``length``, rows with images are read, to know how many tokens they have.
    """
    from lightning_peft.plugin.lightning_cli import parsed_config

    with resolved_recipes([*(f"--config={name}" for name in configs), *overrides]) as words:
        config = parsed_config(words)
    path, task = str(config["model"]["class_path"]), task_of_config(config)
    sequences = task.sequences_per_row if task else 0
    model, data = _arguments(config["model"]), _arguments(config.get("data"))
    trainer = config["trainer"]
    method, strategy = _method(trainer)
    quantization = _quantization_problem(strategy) if method == "qlora" else ""
    problems = [
        text
        for text, wrong in {
            f"model.class_path={path!r} is not a task that is planned": not sequences,
            "model.init_args.config makes a model of random weights": model.get("config"),
            quantization: quantization,
            "there is no model.init_args.model": not model.get("model"),
        }.items()
        if wrong
    ]
    if problems:
        raise ConfigError(
            f"The run of --config {' '.join(configs)} cannot be planned: {'; '.join(problems)}. "
            "Describe it with --model, --method and the other options of plan."
        )
    checkpointing = {"True": "on", "False": "off"}.get(
        str(strategy.get("gradient_checkpointing")), "auto"
    )
    named = {
        "model": model["model"],
        "revision": model.get("revision"),
        "dtype": model.get("dtype"),
        "method": method,
        "seq-len": _row_length(data)
        if length and _has_images(task, config)
        else data.get("max_length"),
        "batch-size": int(data.get("batch_size") or 8) * sequences,
        "accumulate": trainer.get("accumulate_grad_batches"),
        "r": strategy.get("r"),
        "optimizer": strategy.get("optimizer"),
        "gradient-checkpointing": checkpointing,
        "logits": task.logits if task else None,
        **_of_trainer(trainer, strategy),
    }
    words = [f"--{name}={value}" for name, value in named.items() if value is not None]
    return [*words, *_lists_of(strategy)]


def _lists_of(strategy: dict[str, Any]) -> list[str]:
    """Returns the options of several words."""
    words: list[str] = []
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        value = strategy.get(name)
        # No parameters are not the default.
        if value or (name == "target_parameters" and value is not None):
            values = [value] if isinstance(value, str) else value
            words += [f"--{name.replace('_', '-')}", *values]
    return words


def _of_trainer(trainer: Any, strategy: dict[str, Any]) -> dict[str, Any]:
    """Returns the options that the Trainer has; `devices` that only the machine knows are one."""
    given, sharding = trainer.get("devices"), strategy.get("sharding")
    gpus, nodes, size = device_count(given), trainer.get("num_nodes"), strategy.get("dp_shard_size")
    if size:
        gpus, nodes = size, 1
        note = f"the {size} GPUs that share a base are planned for; others are copies of them."
        print(f"note: dp_shard_size={size}: {note}", file=sys.stderr)
    if strategy.get("offload"):
        note = "the plan has the parts of the base on the GPU, where they are not."
        print(f"note: offload=True: {note}", file=sys.stderr)
    if gpus is None and sharding:
        print(
            f"note: trainer.devices={given!r} depends on the machine, so one GPU is planned for, "
            "and nothing is shared there. --gpus plans for more.",
            file=sys.stderr,
        )
    return {
        "precision": trainer.get("precision"),
        "gpus": gpus,
        "nodes": nodes,
        "sharding": sharding,
    }


def device_count(devices: Any) -> int | None:
    """Returns how many the Trainer takes by ``devices``; ``None`` where the machine decides."""
    if isinstance(devices, str):
        # As Lightning reads them: "2" is a number of devices, "0,1" and "2," are indices.
        text = devices.strip()
        indices = [part for part in text.split(",") if part.strip()]
        devices = indices if "," in text else int(text) if text.isdigit() else None
    count = len(devices) if isinstance(devices, (list, tuple)) else devices
    return count if isinstance(count, int) and count > 0 else None


def _has_images(task: Any, config: Any) -> bool:
    shapes = task.shapes if task else ()
    own = task and task.owns_data(str((config.get("data") or {}).get("class_path")))
    return bool(own) and any("images" in names for _, names in shapes)


def _row_length(data: dict[str, Any]) -> int:
    """Returns the tokens of the longest of the first rows with images, as the processor makes them.

    Where the rows cannot be read, it is the longest row that is allowed.
    """
    from lightning_peft.data.image_text import DEFAULT_MAX_LENGTH, ImageTextData

    some = min(data.get("limit") or _ROWS, _ROWS)
    try:
        read = ImageTextData(**{**data, "limit": some}).read()
        rows = [row for split in read.splits.values() for row in split.select_columns(_COLUMNS)]
        reason = "" if rows else "all have problems"
    except LightningPeftError as error:
        rows, reason = [], first_line(error).rstrip(".")
    if not rows:
        length = int(data.get("max_length") or DEFAULT_MAX_LENGTH)
        note = f"the rows cannot be read ({reason}), so they are taken as of {length:,} tokens"
    else:
        longest = max(rows, key=lambda row: row["length"])
        length = longest["length"]
        pairs = zip(longest["image_starts"], longest["image_ends"], strict=True)
        seen = sum(end - start for start, end in pairs)
        note = f"the longest of {len(rows):,} rows has {length:,} tokens, {seen:,} of images"
    print(f"note: {note}. --seq-len plans for others.", file=sys.stderr)
    return length


def _quantization_problem(strategy: dict[str, Any]) -> str:
    """Why the command, which plans for NF4 with double quantization, cannot plan for the run."""
    names = ("load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    given = {name: strategy[name] for name in names if name in strategy}
    config = engine.quantization_config(strategy.get("quantization_config"), **given)
    backend, default = engine.backend_for(config), engine.quantization_config()
    size = engine.backend_for(default).stored_bytes(1 << 20, default)
    if backend.planning_problem(config) or backend.stored_bytes(1 << 20, config) == size:
        return backend.planning_problem(config) or ""
    label = backend.label(backend.config_to_dict(config))
    return (
        f"its base is quantized as {label}, and this command plans for NF4 with double quantization"
    )


def _arguments(part: Any) -> dict[str, Any]:
    arguments = (part or {}).get("init_args") or {}
    return dict(arguments)


def _method(trainer: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the method and its arguments, of the strategy or of a callback."""
    callbacks = trainer.get("callbacks") or []
    several = callbacks if isinstance(callbacks, list) else [callbacks]
    for part in (trainer.get("strategy"), *several):
        if isinstance(part, str):
            if part in _METHODS:
                return _METHODS[part], {}
            continue
        name = str((part or {}).get("class_path", "")).rpartition(".")[2]
        for start, method in _METHODS.items():
            if name in (f"{start}Strategy", f"{start}Callback"):
                return method, _arguments(part)
    return "full", {}

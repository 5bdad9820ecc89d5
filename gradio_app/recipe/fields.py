"""Settings of a recipe shown in the form: path, type and default.

Model, data and paths have steps of their own (:data:`OTHER_STEPS`); the rest is edited as YAML
(:data:`YAML_ONLY`). A test compares these tables with ``recipes/forkme.yaml`` and the signatures of
the classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradio_app.recipe.allowlist import REWARDS
from gradio_app.recipe.setting import STRATEGY, Field, setting, strategy_setting

_MODEL, _DATA = "model.init_args.", "data.init_args."
_TRAINER, _CALLBACKS = "trainer.", "trainer.callbacks."
_STOP, _BEST = (f"{_CALLBACKS}{name}.init_args." for name in ("StopEarly", "BestCheckpoint"))
_SAMPLES, _BUDGET = (_CALLBACKS + name for name in ("LogSamples", "ValidationBudget"))
_PRECISIONS = (None, "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
_INITS = (True, False, "gaussian", "pissa", "olora", "orthogonal")
_SHAPES = ("auto", "messages", "alpaca", "prompt_completion", "text")
_REWARDS, _GRPO = tuple(sorted(REWARDS)), "RewardTuning"
_WITH_BETA = f"PreferenceTuning UnpairedPreferenceTuning {_GRPO}"
_SEED: dict[str, Any] = {"ge": 0, "le": 2**32 - 1}

_GROUPS: dict[str, tuple[Field, ...]] = {
    "training": (
        setting(_TRAINER + "max_epochs", kind="integer", ge=1, le=10_000),
        setting(_MODEL + "learning_rate", 2e-4, gt=0, le=1),
        setting(_MODEL + "schedule", "cosine", ("cosine", "linear", "constant"), tasks="rows"),
        setting(_MODEL + "warmup", 0.03, ge=0, le=0.99, tasks="rows"),
        setting(_MODEL + "weight_decay", 0.001, ge=0, le=10, tasks="rows"),
        setting(_TRAINER + "gradient_clip_val", kind="number", ge=0),
        setting(_TRAINER + "max_steps", -1, ge=-1, le=100_000_000),
        setting(_TRAINER + "max_time"),
        setting("seed_everything", 0, **_SEED),
        setting(_MODEL + "rewards", (), _REWARDS, kind="several", tasks=_GRPO),
        setting(_MODEL + "num_generations", 8, ge=2, le=1024, tasks=_GRPO),
        setting(_MODEL + "max_completion_length", 256, ge=1, le=1_000_000, tasks=_GRPO),
        setting(_MODEL + "temperature", 1.0, gt=0, le=100, tasks=_GRPO),
        setting(_MODEL + "beta", 0.1, ge=0, le=1000, tasks=_WITH_BETA),
        *(
            setting(_MODEL + name, 1.0, gt=0, tasks="UnpairedPreferenceTuning")
            for name in ("desirable_weight", "undesirable_weight")
        ),
    ),
    "adapter": (
        strategy_setting("r", ge=1, le=4096),
        strategy_setting("lora_alpha", gt=0),
        strategy_setting("lora_dropout", ge=0, le=0.99),
        *map(
            strategy_setting,
            (
                *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
                *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
            ),
        ),
        strategy_setting("init_lora_weights", _INITS),
        strategy_setting("bias"),
        strategy_setting("adapt"),
    ),
    "quantization": tuple(
        map(
            strategy_setting,
            (
                *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"),
                *("load_in_8bit", "cache_quantized_base"),
            ),
        )
    ),
    "batches": (
        setting(_DATA + "batch_size", 8, ge=1, le=65_536),
        setting(_TRAINER + "accumulate_grad_batches", 1, ge=1, le=65_536),
        setting(_DATA + "max_length", kind="integer", ge=1, le=1_000_000, tasks="lengths"),
        setting(_DATA + "over_long", "error", ("error", "truncate", "split"), tasks="tokens"),
        setting(_DATA + "length_grouping", False, tasks="tokens"),
        setting(_DATA + "packing", False, tasks="SupervisedData"),
        setting(_DATA + "shuffle_seed", 0, tasks="tokens", **_SEED),
        setting(_DATA + "num_workers", kind="integer", ge=0, le=64),
    ),
    "memory": (
        setting(_TRAINER + "precision", None, _PRECISIONS),
        setting(_TRAINER + "accelerator", "auto", ("auto", "cpu", "gpu", "mps")),
        setting(_TRAINER + "devices", "auto"),
        strategy_setting(
            "optimizer", (None, "auto", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit")
        ),
        strategy_setting("gradient_checkpointing", ("auto", True, False)),
        setting(_MODEL + "dtype", "auto", ("auto", "float32", "bfloat16", "float16"), tasks="rows"),
    ),
    "rows": (
        setting(_DATA + "shape", "auto", _SHAPES, tasks="SupervisedData"),
        setting(_DATA + "chat_template", tasks="chat_template"),
        setting(_DATA + "system_prompt", tasks="chat_template"),
        setting(
            _DATA + "loss_on", "assistant", ("assistant", "completion"), tasks="SupervisedData"
        ),
        setting(_DATA + "prefix", "", tasks="Seq2SeqData"),
        setting(_DATA + "validation_share", kind="number", ge=0, le=0.99, tasks="rows"),
        setting(_DATA + "test_share", kind="number", ge=0, le=0.99, tasks="rows"),
        setting(_DATA + "split_seed", 0, tasks="rows", **_SEED),
        setting(_DATA + "duplicates", "error", ("error", "keep"), tasks="rows"),
        setting(_DATA + "limit", kind="integer", ge=1, le=10**9, tasks="rows"),
        setting(_DATA + "text_unit", "line", ("line", "paragraph", "document"), tasks="rows"),
        *(setting(_DATA + name, tasks="rows") for name in ("encoding", "delimiter", "sheet")),
        setting(_DATA + "streaming", False, tasks="rows"),
    ),
    "validation": (
        setting(_BUDGET, False),
        setting(_BUDGET + ".init_args.share", 0.1, gt=0, le=0.99),
        setting(_BUDGET + ".init_args.most", 4, ge=1, le=10**4),
        setting(_TRAINER + "val_check_interval", kind="batches", gt=0),
        setting(_TRAINER + "check_val_every_n_epoch", 1, ge=1, le=10_000, optional=True),
        setting(_TRAINER + "num_sanity_val_steps", kind="integer", ge=-1, le=10**6),
        setting(_TRAINER + "limit_train_batches", kind="batches", gt=0),
        setting(_TRAINER + "limit_val_batches", kind="batches", gt=0),
        setting(_TRAINER + "log_every_n_steps", kind="integer", ge=1, le=10**6),
        setting(_CALLBACKS + "StopEarly", False),
        setting(_STOP + "patience", 3, ge=1, le=10**4),
        setting(_STOP + "min_delta", 0.0, ge=0),
        setting(_STOP + "monitor", "val_loss"),
        setting(_STOP + "mode", "min", ("min", "max")),
    ),
    "keeping": (
        setting(_BEST + "monitor", "val_loss"),
        setting(_BEST + "mode", "min", ("min", "max")),
        setting(_BEST + "save_top_k", 1, ge=-1, le=1000),
        setting(_BEST + "save_last", True),
        setting(_BEST + "save_every", kind="integer", ge=1, le=10**8),
        setting(_SAMPLES, False, tasks="generation"),
        setting(_SAMPLES + ".init_args.count", 3, ge=1, le=50, tasks="generation"),
        setting(_SAMPLES + ".init_args.max_new_tokens", 64, ge=1, le=4096, tasks="generation"),
        strategy_setting("verify"),
        strategy_setting("announce"),
    ),
}
FIELDS = tuple(replace(field, group=group) for group, fields in _GROUPS.items() for field in fields)
BY_PATH = {field.path: field for field in FIELDS}
GROUPS = tuple(_GROUPS)
# Shown without opening anything.
BASIC = (
    "trainer.max_epochs",
    "model.init_args.learning_rate",
    "trainer.strategy.init_args.r",
    "data.init_args.batch_size",
    "trainer.accumulate_grad_batches",
    "data.init_args.max_length",
    "model.init_args.rewards",
    "model.init_args.num_generations",
)
# Chosen in the steps for model, data and method.
OTHER_STEPS = frozenset(
    {
        *("model.class_path", "data.class_path", "trainer.strategy.class_path"),
        *(f"{_MODEL}{name}" for name in ("model", "revision", "trust_remote_code")),
        *(f"{_DATA}{name}" for name in ("data", "tokenizer", "columns", "skip_bad_rows")),
        *(f"{_DATA}{name}" for name in ("validation_data", "test_data")),
        *(f"{_DATA}{name}" for name in ("hub_config", "hub_splits", "hub_revision")),
        *(f"{_DATA}{name}_revision" for name in ("tokenizer", "processor")),
    }
)
# In the YAML alone.
YAML_ONLY = frozenset(
    {
        *(f"{_MODEL}{name}" for name in ("config", "average_across_step")),
        *(f"{_DATA}{name}" for name in ("validation_rows", "cache_dir")),
        *(f"{_DATA}{name}" for name in ("reasoning", "chat_template_kwargs", "ignored_keys")),
        *(f"{STRATEGY}{name}" for name in ("peft_config", "quantization_config")),
        *(f"{STRATEGY}{name}" for name in ("ddp_kwargs", "sharding", "lora_plus_lr_ratio")),
        *(f"{STRATEGY}{name}" for name in ("target_parameters", "exclude_from_checkpoint")),
        *(f"{STRATEGY}{name}" for name in ("halve_batch_on_oom", "async_save", "offload")),
        f"{STRATEGY}trainable_token_indices",
        f"{STRATEGY}dp_shard_size",
        *("trainer.num_nodes", "trainer.logger"),
        "trainer.callbacks.BestCheckpoint.init_args.filename",
    }
)

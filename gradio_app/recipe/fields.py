"""The settings of a recipe that the form has: where each stands, of what kind, and its default.

Model, data and paths have steps of their own (:data:`OTHER_STEPS`); the rest is edited as YAML
(:data:`YAML_ONLY`). A test compares these tables with ``recipes/forkme.yaml`` and the signatures of
the classes.
"""

from __future__ import annotations

from gradio_app.recipe.setting import Field, setting
from gradio_app.recipe.strategy_fields import STRATEGY, strategy_field

_MODEL, _DATA = "model.init_args.", "data.init_args."
_TRAINER, _CALLBACKS = "trainer.", "trainer.callbacks."


def _training() -> tuple[Field, ...]:
    group = "training"
    return (
        setting(_TRAINER + "max_epochs", group, kind="integer", ge=1, le=10_000),
        setting(_MODEL + "learning_rate", group, 2e-4, gt=0, le=1),
        setting(
            _MODEL + "schedule", group, "cosine", ("cosine", "linear", "constant"), tasks="rows"
        ),
        setting(_MODEL + "warmup", group, 0.03, ge=0, le=0.99, tasks="rows"),
        setting(_MODEL + "weight_decay", group, 0.001, ge=0, le=10, tasks="rows"),
        setting(_TRAINER + "gradient_clip_val", group, kind="number", ge=0),
        setting(_TRAINER + "max_steps", group, -1, ge=-1, le=100_000_000),
        setting(_TRAINER + "max_time", group, kind="text"),
        setting("seed_everything", group, 0, ge=0, le=2**32 - 1),
    )


def _adapter() -> tuple[Field, ...]:
    group = "adapter"
    modules = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
    more = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    inits = (True, False, "gaussian", "pissa", "olora", "orthogonal")
    return (
        strategy_field("r", group, ge=1, le=4096),
        strategy_field("lora_alpha", group, gt=0),
        strategy_field("lora_dropout", group, ge=0, le=0.99),
        *(strategy_field(name, group) for name in modules),
        *(strategy_field(name, group) for name in more),
        strategy_field("init_lora_weights", group, inits),
        *(strategy_field(name, group) for name in ("bias", "adapt")),
    )


def _quantization() -> tuple[Field, ...]:
    names = ("quant_type", "use_double_quant", "compute_dtype")
    return (
        *(strategy_field(f"bnb_4bit_{name}", "quantization") for name in names),
        *(strategy_field(n, "quantization") for n in ("load_in_8bit", "cache_quantized_base")),
    )


def _memory() -> tuple[Field, ...]:
    group = "memory"
    return (
        setting(
            _TRAINER + "precision",
            group,
            None,
            (None, "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
        ),
        setting(_TRAINER + "accelerator", group, "auto", ("auto", "cpu", "gpu", "mps")),
        setting(_TRAINER + "devices", group, "auto"),
        strategy_field(
            "optimizer",
            group,
            (None, "auto", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"),
        ),
        strategy_field("gradient_checkpointing", group, ("auto", True, False)),
        setting(
            _MODEL + "dtype",
            group,
            "auto",
            ("auto", "float32", "bfloat16", "float16"),
            tasks="rows",
        ),
    )


def _batches() -> tuple[Field, ...]:
    group = "batches"
    return (
        setting(_DATA + "batch_size", group, 8, ge=1, le=65_536),
        setting(_TRAINER + "accumulate_grad_batches", group, 1, ge=1, le=65_536),
        setting(_DATA + "max_length", group, kind="integer", ge=1, le=1_000_000, tasks="lengths"),
        setting(
            _DATA + "over_long", group, "error", ("error", "truncate", "split"), tasks="tokens"
        ),
        setting(_DATA + "length_grouping", group, False, tasks="tokens"),
        setting(_DATA + "packing", group, False, tasks="SupervisedData"),
        setting(_DATA + "shuffle_seed", group, 0, ge=0, le=2**32 - 1, tasks="tokens"),
        setting(_DATA + "num_workers", group, 0, ge=0, le=64),
    )


def _rows() -> tuple[Field, ...]:
    group = "rows"
    shapes = ("auto", "messages", "alpaca", "prompt_completion", "text")
    return (
        setting(_DATA + "shape", group, "auto", shapes, tasks="SupervisedData"),
        setting(_DATA + "chat_template", group, kind="text", tasks="chat_template"),
        setting(_DATA + "system_prompt", group, kind="text", tasks="chat_template"),
        setting(
            _DATA + "loss_on",
            group,
            "assistant",
            ("assistant", "completion"),
            tasks="SupervisedData",
        ),
        setting(_DATA + "prefix", group, "", tasks="Seq2SeqData"),
        setting(_DATA + "validation_share", group, kind="number", ge=0, le=0.99, tasks="rows"),
        setting(_DATA + "test_share", group, kind="number", ge=0, le=0.99, tasks="rows"),
        setting(_DATA + "split_seed", group, 0, ge=0, le=2**32 - 1, tasks="rows"),
        setting(_DATA + "duplicates", group, "error", ("error", "keep"), tasks="rows"),
        setting(_DATA + "limit", group, kind="integer", ge=1, le=10**9, tasks="rows"),
        setting(
            _DATA + "text_unit", group, "line", ("line", "paragraph", "document"), tasks="rows"
        ),
        setting(_DATA + "encoding", group, kind="text", tasks="rows"),
        setting(_DATA + "delimiter", group, kind="text", tasks="rows"),
        setting(_DATA + "sheet", group, kind="text", tasks="rows"),
        setting(_DATA + "streaming", group, False, tasks="rows"),
    )


def _validation() -> tuple[Field, ...]:
    group = "validation"
    return (
        setting(_TRAINER + "val_check_interval", group, kind="batches", gt=0),
        setting(_TRAINER + "check_val_every_n_epoch", group, 1, ge=1, le=10_000, optional=True),
        setting(_TRAINER + "num_sanity_val_steps", group, kind="integer", ge=-1, le=10**6),
        setting(_TRAINER + "limit_train_batches", group, kind="batches", gt=0),
        setting(_TRAINER + "limit_val_batches", group, kind="batches", gt=0),
        setting(_TRAINER + "log_every_n_steps", group, kind="integer", ge=1, le=10**6),
    )


def _stopping() -> tuple[Field, ...]:
    group = "validation"
    return (
        setting(_CALLBACKS + "StopEarly", group, False),
        setting(_CALLBACKS + "StopEarly.init_args.patience", group, 3, ge=1, le=10**4),
        setting(_CALLBACKS + "StopEarly.init_args.min_delta", group, 0.0, ge=0),
        setting(_CALLBACKS + "StopEarly.init_args.monitor", group, "val_loss"),
        setting(_CALLBACKS + "StopEarly.init_args.mode", group, "min", ("min", "max")),
    )


def _keeping() -> tuple[Field, ...]:
    group = "keeping"
    best, samples = _CALLBACKS + "BestCheckpoint.init_args.", _CALLBACKS + "LogSamples"
    return (
        setting(best + "monitor", group, "val_loss"),
        setting(best + "mode", group, "min", ("min", "max")),
        setting(best + "save_top_k", group, 1, ge=-1, le=1000),
        setting(best + "save_last", group, True),
        setting(best + "save_every", group, kind="integer", ge=1, le=10**8),
        setting(samples, group, False, tasks="generation"),
        setting(samples + ".init_args.count", group, 3, ge=1, le=50, tasks="generation"),
        setting(
            samples + ".init_args.max_new_tokens", group, 64, ge=1, le=4096, tasks="generation"
        ),
        *(strategy_field(name, group) for name in ("verify", "announce")),
    )


FIELDS: tuple[Field, ...] = (
    *_training(),
    *_adapter(),
    *_quantization(),
    *_batches(),
    *_memory(),
    *_rows(),
    *_validation(),
    *_stopping(),
    *_keeping(),
)
BY_PATH = {field.path: field for field in FIELDS}
GROUPS = tuple(dict.fromkeys(field.group for field in FIELDS))
# Shown without opening anything.
BASIC = (
    "trainer.max_epochs",
    "model.init_args.learning_rate",
    "trainer.strategy.init_args.r",
    "data.init_args.batch_size",
    "trainer.accumulate_grad_batches",
    "data.init_args.max_length",
)
# Chosen in the steps for model, data and method.
OTHER_STEPS = frozenset(
    {
        *("model.class_path", "data.class_path", "trainer.strategy.class_path"),
        *(f"{_MODEL}{name}" for name in ("model", "revision", "trust_remote_code")),
        *(f"{_DATA}{name}" for name in ("data", "tokenizer", "columns", "skip_bad_rows")),
        *(f"{_DATA}{name}" for name in ("hub_config", "hub_splits", "hub_revision")),
        *(f"{_DATA}{name}_revision" for name in ("tokenizer", "processor")),
    }
)
# In the YAML alone.
YAML_ONLY = frozenset(
    {
        *(f"{_MODEL}{name}" for name in ("config", "average_across_step")),
        *(f"{_DATA}{name}" for name in ("validation_data", "test_data", "cache_dir")),
        *(f"{_DATA}{name}" for name in ("reasoning", "chat_template_kwargs", "ignored_keys")),
        *(f"{STRATEGY}{name}" for name in ("peft_config", "quantization_config", "ddp_kwargs")),
        *("trainer.logger", "trainer.callbacks.BestCheckpoint.init_args.filename"),
    }
)

"""The settings of a recipe that the form has: where each stands, of what kind, and its default.

Model, data and paths have steps of their own (:data:`OTHER_STEPS`); the rest is edited as YAML
(:data:`YAML_ONLY`). A test compares these tables with ``recipes/forkme.yaml`` and the signatures of
the classes.
"""

from __future__ import annotations

from gradio_app.recipe.setting import Field
from gradio_app.recipe.strategy_fields import STRATEGY, strategy_field

_MODEL, _DATA = "model.init_args.", "data.init_args."
_TRAINER, _CALLBACKS = "trainer.", "trainer.callbacks."


def _training() -> tuple[Field, ...]:
    group = "training"
    return (
        Field(_TRAINER + "max_epochs", group, "integer", None, ge=1, le=10_000, optional=True),
        Field(
            _MODEL + "learning_rate",
            group,
            "number",
            2e-4,
            gt=0,
            le=1,
        ),
        Field(
            _MODEL + "schedule",
            group,
            "choice",
            "cosine",
            ("cosine", "linear", "constant"),
            tasks="rows",
        ),
        Field(_MODEL + "warmup", group, "number", 0.03, ge=0, le=0.99, tasks="rows"),
        Field(_MODEL + "weight_decay", group, "number", 0.001, ge=0, le=10, tasks="rows"),
        Field(_TRAINER + "gradient_clip_val", group, "number", None, ge=0, optional=True),
        Field(_TRAINER + "max_steps", group, "integer", -1, ge=-1, le=100_000_000),
        Field(_TRAINER + "max_time", group, "text", None, optional=True),
        Field("seed_everything", group, "integer", 0, ge=0, le=2**32 - 1),
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
        Field(
            _TRAINER + "precision",
            group,
            "choice",
            None,
            (None, "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
        ),
        Field(_TRAINER + "accelerator", group, "choice", "auto", ("auto", "cpu", "gpu", "mps")),
        Field(_TRAINER + "devices", group, "text", "auto"),
        strategy_field(
            "optimizer",
            group,
            (None, "auto", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"),
        ),
        strategy_field("gradient_checkpointing", group, ("auto", True, False)),
        Field(
            _MODEL + "dtype",
            group,
            "choice",
            "auto",
            ("auto", "float32", "bfloat16", "float16"),
            tasks="rows",
        ),
    )


def _batches() -> tuple[Field, ...]:
    group = "batches"
    return (
        Field(
            _DATA + "batch_size",
            group,
            "integer",
            8,
            ge=1,
            le=65_536,
        ),
        Field(_TRAINER + "accumulate_grad_batches", group, "integer", 1, ge=1, le=65_536),
        Field(
            _DATA + "max_length",
            group,
            "integer",
            None,
            ge=1,
            le=1_000_000,
            optional=True,
            tasks="lengths",
        ),
        Field(
            _DATA + "over_long",
            group,
            "choice",
            "error",
            ("error", "truncate", "split"),
            tasks="tokens",
        ),
        Field(_DATA + "length_grouping", group, "switch", False, tasks="tokens"),
        Field(_DATA + "packing", group, "switch", False, tasks="SupervisedData"),
        Field(_DATA + "shuffle_seed", group, "integer", 0, ge=0, le=2**32 - 1, tasks="tokens"),
        Field(_DATA + "num_workers", group, "integer", 0, ge=0, le=64),
    )


def _rows() -> tuple[Field, ...]:
    group = "rows"
    shapes = ("auto", "messages", "alpaca", "prompt_completion", "text")
    return (
        Field(_DATA + "shape", group, "choice", "auto", shapes, tasks="SupervisedData"),
        Field(_DATA + "chat_template", group, "text", None, optional=True, tasks="chat_template"),
        Field(_DATA + "system_prompt", group, "text", None, optional=True, tasks="chat_template"),
        Field(
            _DATA + "loss_on",
            group,
            "choice",
            "assistant",
            ("assistant", "completion"),
            tasks="SupervisedData",
        ),
        Field(_DATA + "prefix", group, "text", "", tasks="Seq2SeqData"),
        Field(
            _DATA + "validation_share",
            group,
            "number",
            None,
            ge=0,
            le=0.99,
            optional=True,
            tasks="rows",
        ),
        Field(
            _DATA + "test_share",
            group,
            "number",
            None,
            ge=0,
            le=0.99,
            optional=True,
            tasks="rows",
        ),
        Field(_DATA + "split_seed", group, "integer", 0, ge=0, le=2**32 - 1, tasks="rows"),
        Field(_DATA + "duplicates", group, "choice", "error", ("error", "keep"), tasks="rows"),
        Field(_DATA + "limit", group, "integer", None, ge=1, le=10**9, optional=True, tasks="rows"),
        Field(
            _DATA + "text_unit",
            group,
            "choice",
            "line",
            ("line", "paragraph", "document"),
            tasks="rows",
        ),
        Field(_DATA + "encoding", group, "text", None, optional=True, tasks="rows"),
        Field(_DATA + "delimiter", group, "text", None, optional=True, tasks="rows"),
        Field(_DATA + "sheet", group, "text", None, optional=True, tasks="rows"),
        Field(_DATA + "streaming", group, "switch", False, tasks="rows"),
    )


def _validation() -> tuple[Field, ...]:
    group = "validation"
    return (
        Field(_TRAINER + "val_check_interval", group, "batches", None, gt=0, optional=True),
        Field(
            _TRAINER + "check_val_every_n_epoch",
            group,
            "integer",
            1,
            ge=1,
            le=10_000,
            optional=True,
        ),
        Field(
            _TRAINER + "num_sanity_val_steps",
            group,
            "integer",
            None,
            ge=-1,
            le=10**6,
            optional=True,
        ),
        Field(_TRAINER + "limit_train_batches", group, "batches", None, gt=0, optional=True),
        Field(_TRAINER + "limit_val_batches", group, "batches", None, gt=0, optional=True),
        Field(
            _TRAINER + "log_every_n_steps", group, "integer", None, ge=1, le=10**6, optional=True
        ),
    )


def _stopping() -> tuple[Field, ...]:
    group = "validation"
    return (
        Field(_CALLBACKS + "StopEarly", group, "switch", False),
        Field(_CALLBACKS + "StopEarly.init_args.patience", group, "integer", 3, ge=1, le=10**4),
        Field(_CALLBACKS + "StopEarly.init_args.min_delta", group, "number", 0.0, ge=0),
        Field(_CALLBACKS + "StopEarly.init_args.monitor", group, "text", "val_loss"),
        Field(_CALLBACKS + "StopEarly.init_args.mode", group, "choice", "min", ("min", "max")),
    )


def _keeping() -> tuple[Field, ...]:
    group = "keeping"
    best, samples = _CALLBACKS + "BestCheckpoint.init_args.", _CALLBACKS + "LogSamples"
    return (
        Field(best + "monitor", group, "text", "val_loss"),
        Field(best + "mode", group, "choice", "min", ("min", "max")),
        Field(best + "save_top_k", group, "integer", 1, ge=-1, le=1000),
        Field(best + "save_last", group, "switch", True),
        Field(best + "save_every", group, "integer", None, ge=1, le=10**8, optional=True),
        Field(samples, group, "switch", False, tasks="generation"),
        Field(samples + ".init_args.count", group, "integer", 3, ge=1, le=50, tasks="generation"),
        Field(
            samples + ".init_args.max_new_tokens",
            group,
            "integer",
            64,
            ge=1,
            le=4096,
            tasks="generation",
        ),
        *(strategy_field(name, group) for name in ("verify", "print_summary")),
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

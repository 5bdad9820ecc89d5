"""Classes a visitor's recipe may name: LightningCLI instantiates any ``class_path``."""

from __future__ import annotations

STRATEGIES = frozenset({"lightning_peft.LoRAStrategy", "lightning_peft.QLoRAStrategy"})
STRATEGY_WORDS = frozenset({"auto", "lora", "qlora"})
_LIGHTNINGS = ("lightning.pytorch", "pytorch_lightning")
CALLBACKS = frozenset(
    {
        f"lightning_peft.tasks.{name}"
        for name in ("BestCheckpoint", "LogSamples", "StopEarly", "ValidationBudget")
    }
    | {
        f"{root}.callbacks.{name}"
        for root in _LIGHTNINGS
        for name in (
            *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint"),
            *("RichProgressBar", "TQDMProgressBar"),
        )
    }
)
LOGGERS = frozenset(
    f"{root}.loggers.{name}" for root in _LIGHTNINGS for name in ("CSVLogger", "TensorBoardLogger")
)
# They send what is logged elsewhere, as whoever runs this page.
PERSONAL_LOGGERS = frozenset(f"{root}.loggers.WandbLogger" for root in _LIGHTNINGS)

TOP = frozenset({"seed_everything", "model", "data", "trainer"})
# Of the Trainer, what is a plain value. Not `plugins`, `profiler`, `default_root_dir`, or what
# would register models elsewhere.
TRAINER = frozenset(
    {
        *("accelerator", "devices", "num_nodes", "precision", "fast_dev_run", "deterministic"),
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "overfit_batches"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches"),
        *("limit_predict_batches", "val_check_interval", "check_val_every_n_epoch"),
        *("num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing"),
        *("enable_progress_bar", "enable_model_summary", "accumulate_grad_batches"),
        *("gradient_clip_val", "gradient_clip_algorithm", "benchmark", "inference_mode"),
        *("use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm"),
        *("reload_dataloaders_every_n_epochs", "enable_autolog_hparams"),
    }
)
# Set by each run, and not taken over from the recipe of an earlier one.
OF_A_RUN = frozenset({"default_root_dir", "profiler", "plugins", "model_registry"})
# Arguments that jsonargparse would make objects of: only left out.
ONLY_NULL = frozenset({"peft_config", "quantization_config", "cache_dir"})
# Reward functions that are part of the package: any other is imported, which runs its module.
REWARDS = frozenset({"json_exactness", "word_overlap"})

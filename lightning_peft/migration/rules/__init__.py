"""Migration rules, one class each."""

from __future__ import annotations

from lightning_peft.migration.finding import Rule
from lightning_peft.migration.rules import (
    checkpoints,
    optimizers,
    quantization,
    strategies,
    training,
    wrapping,
)

RULES: tuple[Rule, ...] = (
    wrapping.PeftWrapping(),
    wrapping.KbitPreparation(),
    wrapping.AdapterLoading(),
    wrapping.WrapperUse(),
    wrapping.BaseModelPath(),
    optimizers.OptimizerGroups(),
    optimizers.EarlyOptimizer(),
    checkpoints.CheckpointHooks(),
    checkpoints.AdapterCheckpointCallback(),
    checkpoints.SavingByHand(),
    checkpoints.NotStrict(),
    checkpoints.LoadFromCheckpoint(),
    strategies.ShardedStrategy(),
    strategies.PlainDdp(),
    strategies.OwnStrategy(),
    strategies.ShardingByHand(),
    quantization.BitsandbytesPlugin(),
    quantization.BitsandbytesConfig(),
    quantization.OldQuantizationArguments(),
    quantization.AutomaticDeviceMap(),
    quantization.OtherFormats(),
    training.MergeScript(),
    training.ZeroConversion(),
    training.FusedQkv(),
    training.RewrittenEncoderLayer(),
    training.Averages(),
    training.Unfreezing(),
    training.UnfreezingByHand(),
)

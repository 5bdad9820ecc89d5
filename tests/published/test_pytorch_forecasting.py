"""The LightningModules of pytorch-forecasting train unedited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kinds.kind import names
from kinds.training import check_refused, trainer_for

from lightning_peft import engine
from lightning_peft.errors import CheckpointError

from .published import Published, check_page, parametrized, published, train

pytest.importorskip("pytorch_forecasting", reason="needs the extra `published`")

import pandas as pd
from lightning.pytorch.trainer.states import RunningStage
from pytorch_forecasting import GroupNormalizer, TimeSeriesDataSet, models
from pytorch_forecasting.metrics import MAE, NormalDistributionLoss

PACKAGE = "pytorch-forecasting"
LSTM = "only its LSTM and output layer have weights besides embeddings: name what to train"


def frame():
    draw, t = np.random.default_rng(0), np.arange(24)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "series": f"s{i}",
                    "time_idx": t,
                    "value": np.sin(t / 3 + i) + 2 + draw.normal(0, 0.1, 24),
                    "price": draw.normal(size=24),
                    "load": draw.normal(size=24),
                    "weekday": (t % 7).astype(str),
                }
            )
            for i in range(4)
        ],
        ignore_index=True,
    )


ALONE = {"time_varying_unknown_reals": ["value"]}
REALS = {**ALONE, "time_varying_known_reals": ["price", "load"]}
GROUPS = {**REALS, "static_categoricals": ["series"]}
EVERYTHING = {**GROUPS, "time_varying_known_categoricals": ["weekday"]}


def dataset(columns) -> TimeSeriesDataSet:
    grouped = "static_categoricals" in columns
    given = {"target_normalizer": GroupNormalizer(groups=["series"])} if grouped else {}
    return TimeSeriesDataSet(
        frame(),
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        min_encoder_length=8,
        max_encoder_length=8,
        max_prediction_length=4,
        **columns,
        **given,
    )


def loss_of(module, batch):
    """Its steps give a loss in the stages of a Trainer only, and predictions elsewhere."""
    module.trainer.state.stage = RunningStage.VALIDATING
    return engine.default_step(module, batch)


def entry(title, columns, left, given, note="", name=None, **more) -> Published:
    data = dataset(columns)
    cls = getattr(models, title)
    return published(
        PACKAGE,
        title,
        name=name or title,
        module=lambda: cls.from_dataset(data, learning_rate=1e-2, **given),
        feed=lambda: tuple(
            data.to_dataloader(train=train, batch_size=16, num_workers=0) for train in (True, False)
        ),
        left=names(*left),
        score=loss_of,
        trusted=True,
        note=note,
        **more,
    )


REFUSED = r"nothing to adapt in (.|\n)*LSTM, Linear(.|\n)*Name layers in `target_modules`"
NAMED = {"target_modules": ["series"], "modules_to_save": ["rnn"]}
NO_LINEAR = {"qlora": "Nothing to quantize(.|\n)*Use LoRAStrategy"}
MODULES = [
    entry(
        "TemporalFusionTransformer",
        EVERYTHING,
        ["output_layer"],
        {"hidden_size": 16, "hidden_continuous_size": 16, "attention_head_size": 2},
    ),
    entry(
        "NBeats",
        ALONE,
        ["net_blocks.1.theta_f_fc"],
        {"widths": [32, 64], "num_blocks": [1, 1], "num_block_layers": [2, 2]},
    ),
    entry("NHiTS", REALS, ["model.blocks.2.layers.layers.4"], {"hidden_size": 32}),
    entry("DecoderMLP", EVERYTHING, ["mlp.sequential.16"], {"hidden_size": 32}),
    entry(
        "TiDEModel",
        EVERYTHING,
        ["model.lookback_skip"],
        {"hidden_size": 16},
        "its last layer, which counts as the head, is a skip connection",
    ),
    entry(
        "TimeXer",
        REALS,
        ["head.linear"],
        {
            "context_length": 8,
            "prediction_length": 4,
            "patch_length": 2,
            "hidden_size": 16,
            "n_heads": 2,
            "e_layers": 1,
            "d_ff": 32,
            "loss": MAE(),
        },
    ),
    entry(
        "xLSTMTime",
        ALONE,
        ["lstm.fc"],
        {"input_size": 1, "hidden_size": 16, "output_size": 1},
        "its inner `lstm.fc` is taken for the head, and trains in full",
    ),
    *(
        entry(
            title,
            GROUPS,
            [],
            given,
            note,
            name=f"{title} {'named' if strategy else 'bare'}",
            strategy=strategy,
            refused=refused,
        )
        for title, given in (
            ("DeepAR", {"hidden_size": 16, "loss": NormalDistributionLoss()}),
            ("RecurrentNetwork", {"hidden_size": 16}),
        )
        for strategy, refused, note in (
            ({}, dict.fromkeys(("lora", "qlora"), REFUSED), LSTM),
            (
                NAMED,
                NO_LINEAR,
                'with `target_modules=["series"]`, an embedding, and `modules_to_save=["rnn"]`; '
                "QLoRA finds nothing to quantize",
            ),
        )
    ),
]


@parametrized(MODULES, refused=False)
def test_it_trains_unedited(entry: Published, method: str, tmp_path: Path) -> None:
    train(entry, method, tmp_path)


@parametrized(MODULES, refused=True)
def test_it_is_refused_with_a_fix(entry: Published, method: str, tmp_path: Path) -> None:
    check_refused(entry, method, tmp_path)


def test_a_checkpoint_with_its_objects_is_read_only_if_trusted(tmp_path: Path) -> None:
    kind = MODULES[1]
    module = kind.make()
    trainer = trainer_for(kind, "lora", module, tmp_path)
    trainer.fit(module, *kind.loaders())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = kind.make()
    with pytest.raises(CheckpointError, match="pass weights_only=False"):
        trainer_for(kind, "lora", again, tmp_path).validate(
            again, kind.loaders()[1], ckpt_path=tmp_path / "run.ckpt"
        )


def test_the_documentation_says_so() -> None:
    check_page(PACKAGE, MODULES)

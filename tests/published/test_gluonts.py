"""The LightningModules of gluonts' torch estimators train unedited."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds.kind import names
from kinds.training import METHODS, trainer_for

from .published import Published, check_page, parametrized, published, train

pytest.importorskip("gluonts", reason="needs the extra `published`")
pytest.importorskip("gluonts.torch", reason="needs the extra `published`")

from gluonts.dataset.common import ListDataset
from gluonts.dataset.multivariate_grouper import MultivariateGrouper


def series():
    draw, t = np.random.default_rng(0), np.arange(60)
    return ListDataset(
        [
            {
                "start": "2024-01-01",
                "target": np.sin(t / 3 + i) + 3 + draw.normal(0, 0.1, 60),
                "item_id": str(i),
            }
            for i in range(8)
        ],
        freq="D",
    )


class Estimator:
    """Makes one of gluonts' estimators, and what it makes."""

    def __init__(self, home: str, title: str, **given) -> None:
        self.home, self.title, self.given = home, title, given

    def make(self, **more):
        cls = getattr(import_module(f"gluonts.torch.model.{self.home}"), self.title)
        given = {"prediction_length": 4, "lr": 1e-2, "batch_size": 8, **self.given, **more}
        return cls(num_batches_per_epoch=3, **given)

    def module(self):
        return self.make().create_lightning_module()

    def loaders(self):
        estimator = self.make()
        grouped = self.home == "i_transformer"
        data = MultivariateGrouper()(series()) if grouped else series()
        data = estimator.create_transformation().apply(data, is_train=True)
        module = estimator.create_lightning_module()
        return (
            estimator.create_training_data_loader(data, module),
            estimator.create_validation_data_loader(data, module),
        )


def entry(
    home: str,
    title: str,
    left=("model.args_proj.proj.2",),
    idle=(),
    note="",
    name=None,
    strategy=None,
    **given,
):
    made = Estimator(home, f"{title}Estimator", **given)
    return published(
        "gluonts",
        f"{title}LightningModule",
        name=name or home,
        strategy=strategy or {},
        module=made.module,
        feed=made.loaders,
        left=names(*left),
        idle=names(*idle),
        note=note,
    )


TRANSFORMER = {"context_length": 16, "d_model": 16, "nhead": 2, "dim_feedforward": 32}
FORWARD = Estimator(
    "simple_feedforward", "SimpleFeedForwardEstimator", context_length=8, hidden_dimensions=[16, 16]
)
MODULES = [
    entry("simple_feedforward", "SimpleFeedForward", **FORWARD.given),
    entry(
        "simple_feedforward",
        "SimpleFeedForward",
        left=[f"model.args_proj.proj.{index}" for index in range(3)],
        note='with `modules_to_save=["args_proj"]`: all output projections train in full',
        name="simple_feedforward saved",
        strategy={"modules_to_save": ["args_proj"]},
        **FORWARD.given,
    ),
    entry("patch_tst", "PatchTST", patch_len=4, stride=2, **TRANSFORMER),
    entry("lag_tst", "LagTST", freq="D", **TRANSFORMER),
    entry("i_transformer", "ITransformer", note="several series at once", **TRANSFORMER),
    entry("d_linear", "DLinear", context_length=16, hidden_dimension=8, kernel_size=5),
    entry(
        "deepar",
        "DeepAR",
        freq="D",
        context_length=8,
        num_layers=1,
        hidden_size=16,
        lags_seq=[1, 2, 7],
        left=["model.param_proj.proj.2"],
        note="adapters on the output projections only; the LSTM stays as it was",
    ),
    entry(
        "tft",
        "TemporalFusionTransformer",
        freq="D",
        context_length=8,
        hidden_dim=16,
        num_heads=2,
        left=["model.temporal_decoder.ff_net.1"],
        idle=["feat_static_proj"],
        note="without static features, their projection sees only zeros and does not train",
    ),
    entry(
        "tide",
        "TiDE",
        freq="D",
        context_length=8,
        encoder_hidden_dim=8,
        decoder_hidden_dim=8,
        temporal_hidden_dim=8,
        distr_hidden_dim=8,
        left=[
            f"model.{block}.fc.{index}"
            for block in ("feat_proj.proj", "temporal_decoder.temporal_decoder")
            for index in (0, 2)
        ],
        note="two inner blocks called `fc` are taken for heads, and train in full",
    ),
    entry(
        "wavenet",
        "WaveNet",
        freq="D",
        num_residual_channels=8,
        num_skip_channels=8,
        dilation_depth=2,
        num_stacks=1,
        seasonality=3,
        embedding_dimension=2,
        left=[],
        note="no linear layers: the adapters are on its convolutions",
    ),
]


@parametrized(MODULES, refused=False)
def test_it_trains_unedited(entry: Published, method: str, tmp_path: Path) -> None:
    train(entry, method, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_module_becomes_a_predictor(method: str, tmp_path: Path) -> None:
    estimator, kind = FORWARD.make(), MODULES[0]
    module = kind.make()
    trainer_for(kind, method, module, tmp_path).fit(module, *kind.loaders())
    predictor = estimator.create_predictor(estimator.create_transformation(), module.eval())
    forecasts = list(predictor.predict(series()))
    assert len(forecasts) == 8
    assert all(np.isfinite(forecast.mean).all() for forecast in forecasts)


@pytest.mark.parametrize("method", METHODS)
def test_the_training_loop_of_the_estimator_ends_in_an_error(method: str, tmp_path: Path) -> None:
    """It reads the checkpoint past the Trainer, which holds no base weights."""
    estimator = FORWARD.make(
        trainer_kwargs={
            "strategy": METHODS[method](r=4, announce=False),
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
    )
    with pytest.raises(RuntimeError, match="load this file with lightning_peft"):
        estimator.train(series(), series())
    (kept,) = tmp_path.rglob("*.ckpt")
    assert "lightning_peft" in torch.load(kept, weights_only=True)


def test_the_documentation_says_so() -> None:
    check_page("gluonts", MODULES)

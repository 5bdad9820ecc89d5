"""The LightningModules of neuralforecast train unedited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kinds.kind import names
from kinds.training import check_refused, trainer_for

import lightning_peft
from lightning_peft.errors import LifecycleError

from .published import Published, check_page, parametrized, published, train

pytest.importorskip("neuralforecast", reason="needs the extra `published`")

import pandas as pd
from neuralforecast import NeuralForecast, models
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

PACKAGE = "neuralforecast"
COMMON = {"h": 4, "input_size": 12, "max_steps": 8, "learning_rate": 1e-2, "batch_size": 2}
SERIES = 4


def frame():
    draw, t = np.random.default_rng(0), np.arange(60)
    return pd.concat(
        pd.DataFrame(
            {
                "unique_id": f"s{i}",
                "ds": pd.date_range("2024", periods=60),
                "y": np.sin(t / 3 + i) + 3 + draw.normal(0, 0.1, 60),
            }
        )
        for i in range(SERIES)
    )


def loaders(batch_size: int):
    data = TimeSeriesDataset.from_df(frame())[0]
    module = TimeSeriesDataModule(data, batch_size=batch_size, valid_batch_size=SERIES)
    return module.train_dataloader(), module.val_dataloader()


def entry(title: str, left=(), note="", idle=(), name=None, refused=None, **given) -> Published:
    def make():
        windows = {} if "n_series" in given else {"windows_batch_size": 16}
        made = getattr(models, title)(**COMMON, **windows, **given)
        # What its own `fit` does before it makes a Trainer.
        made.val_size, made.test_size = 4, 0
        return made

    return published(
        PACKAGE,
        title,
        name=name or title,
        module=make,
        feed=lambda: loaders(given.get("n_series", 2)),
        left=names(*left),
        idle=names(*idle),
        note=note,
        refused=refused or {},
    )


def nothing(kinds: str) -> dict[str, str]:
    message = rf"nothing to adapt in (.|\n)*{kinds}(.|\n)*Name layers in `target_modules`"
    return dict.fromkeys(("lora", "qlora"), message)


LAST = ["blocks.2.layers.7"]
PERCEPTRONS = {"mlp_units": 3 * [[16, 16]]}
RECURRENT = {"encoder_hidden_size": 16, "decoder_hidden_size": 16}
DECODER = "adapters on its decoder; the recurrent layers stay as they were"
ATTENTION = {"hidden_size": 16, "n_head": 2, "conv_hidden_size": 16, "encoder_layers": 1}
SEVERAL = {"n_series": SERIES}
TIDE = entry(
    "TiDE",
    note='by `verify="full"`: with its default `layernorm=True` and a loss of one output it '
    "normalizes single numbers, so that no gradient passes",
    refused=dict.fromkeys(("lora", "qlora"), "the loss does not depend on"),
    hidden_size=16,
    decoder_output_dim=4,
    temporal_decoder_dim=16,
)
MODULES = [
    entry("NHITS", LAST, **PERCEPTRONS),
    entry("NBEATS", LAST, **PERCEPTRONS),
    entry("MLP", ["out"], hidden_size=16, num_layers=2),
    entry("DLinear", ["linear_season"], moving_avg_window=3),
    entry(
        "PatchTST",
        ["model.head.linear"],
        hidden_size=16,
        n_heads=2,
        encoder_layers=1,
        linear_hidden_size=32,
        patch_len=4,
        stride=2,
    ),
    entry(
        "TFT",
        ["output_adapter"],
        "without covariates, its layers for them see constants and do not train",
        ["future_vsn.joint_grn", "lin_c"],
        hidden_size=16,
        n_head=2,
    ),
    entry("Informer", ["decoder.projection"], **ATTENTION),
    entry("iTransformer", ["projector"], hidden_size=16, n_heads=2, e_layers=1, d_ff=32, **SEVERAL),
    entry("TSMixer", ["out"], n_block=1, ff_dim=16, **SEVERAL),
    entry("TimesNet", ["projection"], hidden_size=16, conv_hidden_size=16, encoder_layers=1),
    entry("LSTM", ["mlp_decoder.layers.3"], DECODER, encoder_n_layers=1, **RECURRENT),
    entry("TCN", ["mlp_decoder.layers.3"], **RECURRENT),
    entry(
        "TiDE",
        ["global_skip"],
        "with `layernorm=False`",
        name="TiDE without norm",
        layernorm=False,
        hidden_size=16,
        decoder_output_dim=4,
        temporal_decoder_dim=16,
    ),
    TIDE,
    entry(
        "NLinear",
        note="its only layer is its head",
        refused=nothing("kinds Linear"),
    ),
    entry(
        "DeepAR",
        note="an LSTM and its output layer",
        refused=nothing("LSTM, Linear"),
        lstm_hidden_size=16,
        lstm_n_layers=1,
    ),
    entry(
        "KAN",
        note="its layers are of a kind of its own",
        refused=nothing("KANLinear"),
        hidden_size=16,
        n_hidden_layers=1,
    ),
]


@parametrized(MODULES, refused=False)
def test_it_trains_unedited(entry: Published, method: str, tmp_path: Path) -> None:
    train(entry, method, tmp_path)


@parametrized(MODULES, refused=True)
def test_it_is_refused_with_a_fix(entry: Published, method: str, tmp_path: Path) -> None:
    if entry is TIDE:
        # Found by running it, so after its layers were quantized.
        module = entry.make()
        with pytest.raises(LifecycleError, match=entry.refused[method]):
            trainer_for(entry, method, module, tmp_path).fit(module, *entry.loaders())
    else:
        check_refused(entry, method, tmp_path)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_its_own_training_loop_takes_the_strategy_by_name(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = models.NHITS(
        **COMMON,
        **PERCEPTRONS,
        windows_batch_size=16,
        val_check_steps=4,
        strategy=method,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    forecaster = NeuralForecast(models=[net], freq="D")
    forecaster.fit(frame(), val_size=4)
    (trained,) = forecaster.models
    on = forecaster.predict().NHITS
    with lightning_peft.disable_adapters(trained):
        off = forecaster.predict().NHITS
    assert (on - off).abs().max() > 1e-3
    # Its files hold no adapters, and it silently ignores what is missing.
    lightning_peft.merge(trained)
    lightning_peft.unload(trained)
    trained.trainer_kwargs.pop("strategy")
    merged = forecaster.predict().NHITS
    assert (merged - on).abs().max() < 1e-4
    trained.save(str(tmp_path / "nhits"))
    loaded = models.NHITS.load(str(tmp_path / "nhits"))
    weights = trained.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all((value == weights[name]).all() for name, value in loaded.state_dict().items())


def test_its_files_lose_adapters_that_are_not_merged(tmp_path: Path) -> None:
    """It silently ignores unknown weights in files."""
    net = MODULES[0].make()
    lightning_peft.inject(net, r=4)
    net.save(str(tmp_path / "nhits"))
    loaded = models.NHITS.load(str(tmp_path / "nhits"))
    assert loaded.state_dict().keys() < net.state_dict().keys()
    lightning_peft.save_adapter(net, tmp_path / "adapter")
    lightning_peft.load_adapter(loaded, tmp_path / "adapter")
    assert loaded.state_dict().keys() == net.state_dict().keys()


def test_the_documentation_says_so() -> None:
    check_page(PACKAGE, MODULES)

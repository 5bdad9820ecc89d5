"""The forecaster: its numbers, its weights, and a module of the user's own next to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import short_runs
import torch
from safetensors.torch import load_file, save_file

from lightning_peft.data.series import SeriesData
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.loading import load_from_checkpoint
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.time_series import Forecaster

HERE = Path(__file__).parents[2]
SHIPPED = HERE / "recipes" / "small" / "data"
SIZES = {"horizon": 3, "width": 8, "blocks": 2}
ROOT = ROOTS[1]


@pytest.fixture
def data(tmp_path):
    def data(name="waves", shift=0.0, **options):
        steps = np.arange(200)
        noise = np.random.default_rng(3).normal(size=(200, 2)) / 10
        waves = np.stack([np.sin(steps / 3 + shift), 50 + 9 * np.cos(steps / 5 + shift)], 1) + noise
        path = tmp_path / f"{name}.csv"
        path.write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in waves))
        options = {"context": 12, "horizon": 3, "season": 2, "batch_size": 16, **options}
        return bind_to_lightning(SeriesData, ROOT)(str(path), **options)

    return data


def net(**options):
    torch.manual_seed(1)
    return bind_to_lightning(Forecaster, ROOT)(**{**SIZES, **options})


def trainer(**options):
    return short_runs.trainer(**{"max_steps": 20, "num_sanity_val_steps": 0, **options})


def adapting(method, **options):
    return trainer(strategy=short_runs.STRATEGIES[method](r=4, announce=False), **options)


def test_metrics_are_those_counted_by_hand(data):
    module, series = net(), data()
    logged = trainer().validate(module, series, verbose=False)[0]
    windows = series.windows("validation")
    past, future = (torch.stack([w[name] for w in windows]) for name in ("past", "future"))
    with torch.no_grad():
        error = module(past) - future
    known = series.statistics()
    # Two steps make a season: the forecast is the last two values, again and again.
    naive = torch.stack([past[:, -2], past[:, -1], past[:, -2]], 1) - future
    expected = {
        "loss": (error.abs() / known.std).mean(),
        "mae": error.abs().mean(),
        "rmse": error.square().mean().sqrt(),
        "mase": (error.abs() / known.naive_error).mean(),
        "mase_naive": (naive.abs() / known.naive_error).mean(),
    }
    assert {name: logged[f"val_{name}"] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def test_a_forecast_depends_on_the_past_alone_and_on_each_column_alone(data):
    module = net()
    trainer().validate(module, data(), verbose=False)
    past = torch.randn(2, 12, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(past)[0, :, 1].sum(), past)
    assert gradient[0, :, 1].any()
    assert not gradient[1].any()
    assert not gradient[0, :, 0].any()
    # The receptive field: 2 ** (blocks + 1) - 1 steps.
    assert (gradient[0, :, 1] != 0).sum() == 7
    module.blocks.requires_grad_(False)
    hidden = module.stem(torch.randn(1, 1, 12))
    changed = hidden.clone()
    changed[..., 8:] += 1
    for block in module.blocks:
        hidden, changed = block(hidden), block(changed)
    torch.testing.assert_close(hidden[..., :8], changed[..., :8])


def test_scale_is_that_of_the_training_steps(data):
    """A series in other units is forecast in other units, and equally well."""
    plain, module = data(), net()
    trainer().validate(module, plain, verbose=False)
    past = plain.windows("test")[0]["past"][None]
    before = module(past)
    module.mean, module.std = module.mean * 7 + 5, module.std * 7
    torch.testing.assert_close(module(past * 7 + 5), before * 7 + 5)


@pytest.mark.parametrize("method", short_runs.STRATEGIES)
def test_it_is_adapted_to_another_series_and_comes_back_with_its_scale(method, data, tmp_path):
    before = net()
    trainer(max_steps=60).fit(before, data("first"))
    names = ("mean", "std", "naive_error")
    weights = {n: v for n, v in before.state_dict().items() if n not in names}
    save_file(weights, tmp_path / "base.safetensors")
    module, series = (
        net(checkpoint=str(tmp_path / "base.safetensors"), learning_rate=1e-2),
        data("second", 2.0),
    )
    run = adapting(method)
    start = run.validate(module, series, verbose=False)[0]["val_loss"]
    run = adapting(method)
    module = net(checkpoint=str(tmp_path / "base.safetensors"), learning_rate=1e-2)
    run.fit(module, series)
    assert run.callback_metrics["val_loss"] < start
    moving = {name for name, param in module.named_parameters() if param.requires_grad}
    assert {name for name in moving if "lora_" not in name} == {"head.weight", "head.bias"}
    if method == "lora":
        for name, value in module.named_parameters():
            if name not in moving:
                assert torch.equal(value, weights[name])
    run.save_checkpoint(tmp_path / "one.ckpt")
    loaded = load_from_checkpoint(bind_to_lightning(Forecaster, ROOT), tmp_path / "one.ckpt")
    assert loaded.hparams["columns"] == ["a", "b"]
    past = series.windows("test")[0]["past"][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(past), module.eval()(past))
    longer = data("second", 2.0, validation_share=0.4)
    assert not torch.equal(longer.statistics().mean, series.statistics().mean)
    (forecast,) = adapting(method).predict(
        net(checkpoint=str(tmp_path / "base.safetensors")),
        longer,
        ckpt_path=str(tmp_path / "one.ckpt"),
    )[0]
    with torch.no_grad():
        expected = loaded(longer.values()[-12:][None])[0]
    assert list(forecast) == ["a", "b"]
    torch.testing.assert_close(torch.tensor([forecast["a"], forecast["b"]]).T, expected)


def test_a_trainers_checkpoint_is_a_base_as_well(data, tmp_path):
    first = net()
    run = trainer(max_steps=3)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "full.ckpt")
    again = net(checkpoint=str(tmp_path / "full.ckpt"))
    for name, value in first.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], value)


def test_weights_that_do_not_fit_are_refused_with_all_that_differs(tmp_path):
    weights = {n: v for n, v in net(blocks=1).state_dict().items() if v.numel()}
    save_file({**weights, "more": torch.ones(1)}, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError) as error:
        net(checkpoint=str(tmp_path / "base.safetensors"), horizon=5)
    message = str(error.value)
    assert "blocks.1.first.weight is missing" in message
    assert "more is not a weight of this net" in message
    assert "head.weight is (3, 8), and here (5, 8)" in message
    with pytest.raises(ConfigError, match="nowhere.safetensors' is not a file"):
        net(checkpoint="nowhere.safetensors")


def test_data_of_another_horizon_or_other_columns_is_refused(data):
    with pytest.raises(ConfigError, match="horizon=3.* and the data with horizon=4"):
        trainer().validate(net(), data(horizon=4), verbose=False)
    with pytest.raises(ConfigError, match="made for the columns b, a, and the data has a, b"):
        trainer().validate(net(columns=["b", "a"]), data(), verbose=False)


def test_the_shipped_weights_know_the_shipped_temperatures():
    assert (SHIPPED / "forecaster.safetensors").stat().st_size < 100_000
    weights = load_file(SHIPPED / "forecaster.safetensors")
    assert weights["blocks.4.first.weight"].shape == (32, 32, 3)
    series = bind_to_lightning(SeriesData, ROOT)(str(SHIPPED / "seattle.csv"), time="date")
    module = bind_to_lightning(Forecaster, ROOT)(checkpoint=str(SHIPPED / "forecaster.safetensors"))
    logged = trainer().validate(module, series, verbose=False)[0]
    assert logged["val_mase"] < 0.9 * logged["val_mase_naive"]


OWN = """
import lightning.pytorch as L
import torch
from torch import nn


class Own(L.LightningModule):
    def __init__(self, hidden: int = 16):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, hidden, 3), nn.ReLU(), nn.Conv1d(hidden, hidden, 3))
        self.head = nn.Linear(hidden, 8)

    def loss(self, batch):
        past = batch["past"][:, :, 0] - batch["past"][:, -1:, 0]
        forecast = self.head(self.net(past[:, None])[..., -1])
        return nn.functional.l1_loss(forecast + batch["past"][:, -1:, 0], batch["future"][:, :, 0])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)
"""
CONFIG = """
model: {class_path: own.Own}
data:
  class_path: lightning_peft.SeriesData
  init_args: {data: %s, time: month, batch_size: 32}
trainer:
  strategy: {class_path: lightning_peft.QLoRAStrategy, init_args: {r: 4, verify: cheap}}
  max_epochs: 2
  enable_progress_bar: false
"""


def test_a_module_of_the_users_own_needs_a_config_and_nothing_else(program, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.yaml").write_text(CONFIG % (SHIPPED / "el_nino.csv"))
    code, _, err = program.run(tmp_path, "fit", "--config=own.yaml")
    assert code == 0, err[-3000:]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {"head.weight", "net.0.lora_A.default.weight"} <= set(names)
    assert "net.2.weight" not in names

"""Time series: windows, splits that never look ahead, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_peft.data.series import SeriesData
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning

from .conftest import refusal

SMALL = {"context": 4, "horizon": 3, "batch_size": 100, "validation_share": 0.2, "test_share": 0.1}


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "series.csv").write_text(text)
        return str(tmp_path / "series.csv")

    return write


def make(path, **options):
    return bind_to_lightning(SeriesData, ROOTS[1])(path, **{**SMALL, **options})


def table(steps=50):
    """The step itself, and its square, so that every value says where it comes from."""
    return "t,x,y\n" + "".join(
        f"2024-01-01T{i // 60:02d}:{i % 60:02d},{i},{i * i}\n" for i in range(steps)
    )


def test_no_forecast_of_a_split_lies_in_another(write):
    data = make(write(table()), time="t")
    data.setup("fit")
    assert data.columns == ["x", "y"]
    assert data.borders() == {"train": (0, 35), "validation": (35, 45), "test": (45, 50)}
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for (first, end), loader in zip(data.borders().values(), loaders, strict=True):
        (batch,) = loader
        past, future = batch["past"], batch["future"]
        assert past.shape[1:] == (4, 2)
        steps = torch.cat([past, future], 1)[..., 0]
        assert (steps.diff(dim=1) == 1).all()
        assert torch.equal(torch.cat([past, future], 1)[..., 1], steps**2)
        seen = sorted(set(future[..., 0].flatten().tolist()))
        assert seen == list(range(max(first, 4), end))
        assert len(past) == end - max(first, 4) - 2


def test_statistics_know_the_training_steps_alone(write):
    data = make(write(table()), time="t", season=2, context=4)
    x = np.arange(35.0)
    for place, values in enumerate((x, x**2)):
        statistics = data.statistics()
        assert statistics.mean[place] == pytest.approx(values.mean())
        assert statistics.std[place] == pytest.approx(values.std(ddof=1))
        assert statistics.naive_error[place] == pytest.approx(
            np.abs(values[2:] - values[:-2]).mean()
        )


def test_the_future_is_forecast_from_the_last_rows(write):
    (batch,) = make(write(table()), columns=["x"], time="t").predict_dataloader()
    assert batch["past"].tolist() == [[[46.0], [47.0], [48.0], [49.0]]]


def test_all_rows_that_break_the_series_are_reported(write):
    rows = table(30).splitlines()
    rows[4] = "2024-01-01T00:03,,9"
    rows[6] = "2024-01-01T00:05,5,inf"
    rows[9] = "2024-01-01T00:07,8,64"
    rows[12] = "soon,11,121"
    rows[20] = "2024-01-01T00:29,19,361"
    errors = refusal(make(write("\n".join(rows)), time="t"))
    for wanted in (
        "row 4 has '' as x",
        "row 6 has 'inf' as y",
        "row 9 has t '2024-01-01T00:07' after '2024-01-01T00:07', not one step later",
        "row 12 has 'soon' as t, which is not a time",
        "row 20 has t '2024-01-01T00:29' after '2024-01-01T00:18'",
        "row 21 has t '2024-01-01T00:20' after '2024-01-01T00:29'",
    ):
        assert wanted in errors, errors
    assert "7 of 30 rows cannot be used" in errors


@pytest.mark.parametrize("form", ["{}-{:02d}", "{}-{:02d}-01", "{}/{:02d}/15"])
def test_months_are_steps_although_they_differ_in_length(form, write):
    months = [form.format(2020 + i // 12, i % 12 + 1) for i in range(40)]
    rows = [f"{month},{i}" for i, month in enumerate(months)]
    make(write("\n".join(["t,x", *rows])), time="t").setup("fit")
    del rows[20]
    with pytest.raises(ConfigError, match="1 of 39 rows") as error:
        make(write("\n".join(["t,x", *rows])), time="t").setup("fit")
    assert f"row 21 has t '{months[21]}' after '{months[19]}'" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 40}, "too few for context=40"),
        ({"test_share": 0.02}, "test has 1 steps"),
        ({"columns": ["z"]}, "'z' is not a column"),
        ({"columns": ["flat"]}, "flat in .*nothing to learn"),
        ({"season": 5}, "season=5 is more than the context=4"),
        ({"horizon": 0}, "horizon=0 is less than 1"),
        ({"validation_share": 0.9, "test_share": 0.1}, "not shares that leave something"),
    ],
)
def test_what_cannot_be_forecast_is_refused(options, message, write):
    lines = table().splitlines()
    text = "\n".join([lines[0] + ",flat", *(line + ",7" for line in lines[1:])])
    with pytest.raises(ConfigError, match=message):
        make(write(text), **{"columns": ["x"], **options}).setup("fit")

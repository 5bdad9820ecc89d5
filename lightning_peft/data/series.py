"""Data for time series: windows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft.data.file_format import Row
from lightning_peft.data.reading import Source, describe_formats, log_formats
from lightning_peft.data.validation import Problem, describe
from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.plugin.namespace import LateBoundMeta
from lightning_peft.processes import lead_own_group

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule as _Base
else:
    _Base = object


@dataclass(frozen=True)
class Statistics:
    """What is known of the training steps, and of nothing later.

    Attributes:
        mean: Of each column, ``(columns,)``, float32.
        std: Sample standard deviation of each column, ``(columns,)``.
        naive_error: Mean absolute error, over these steps, of the forecast that each value is that
            of one season before, ``(columns,)``: the denominator of MASE (Hyndman and Koehler,
            2006, https://doi.org/10.1016/j.ijforecast.2006.03.001).
    """

    mean: Tensor
    std: Tensor
    naive_error: Tensor


class Windows(Dataset[dict[str, Tensor]]):
    """Every window whose forecast lies in ``first`` up to ``end`` of the steps of ``values``.

    ``values`` is ``(steps, columns)``, float32; the ``context`` before may begin before ``first``.
    """

    def __init__(self, values: Tensor, first: int, end: int, context: int, horizon: int) -> None:
        self.values, self.context, self.horizon = values, context, horizon
        self.starts = range(max(first, context), end - horizon + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """Returns ``past``, ``(context, columns)``, and ``future``, ``(horizon, columns)``."""
        start = self.starts[place]
        return {
            "past": self.values[start - self.context : start],
            "future": self.values[start : start + self.horizon],
        }


class SeriesData(_Base, metaclass=LateBoundMeta):
    """Windows of one or more time series, in the units of the data.

    The last steps are tested with, those before them validated with, and the first trained on:
    nothing is learnt from what comes after it. ``predict`` forecasts what follows the last row.

    Args:
        data: File (CSV, TSV, Excel, JSONL, JSON, Parquet) with a row for each step, in order.
        columns: The columns to forecast, each a series of its own; by default all in which the
            first row has a number.
        time: Column of dates or numbers, which must rise evenly.
        context: Steps that the model sees.
        horizon: Steps that it forecasts.
        season: Steps after which the series repeats, for the naive forecast that MASE compares
            with; 1 is the forecast that nothing changes.
        validation_share: Share of the steps to validate with.
        test_share: Share of the steps to test with.
        batch_size: Windows per batch and device.
        num_workers: Processes that load batches; ``None`` is none.
        encoding: Encoding of a text file, such as ``"cp1252"``; by default it is detected.
        delimiter: What parts the columns of a table, such as ``";"``; by default it is detected.
        sheet: Name of the sheet of an Excel workbook, or its number from 1.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    lightning_base = "core.datamodule.LightningDataModule"

    def __init__(
        self,
        data: str,
        columns: list[str] | None = None,
        time: str | None = None,
        context: int = 64,
        horizon: int = 8,
        season: int = 1,
        validation_share: float = 0.15,
        test_share: float = 0.15,
        batch_size: int = 64,
        num_workers: int | None = None,
        encoding: str | None = None,
        delimiter: str | None = None,
        sheet: str | int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        # An attribute, so that Lightning can look for the greatest batch that fits.
        self.batch_size = batch_size
        self.horizon, self.season = horizon, season
        self.columns: list[str] = []
        self._values: Tensor | None = None
        numbers = {"context": context, "horizon": horizon, "season": season}
        numbers["batch_size"] = batch_size
        problems = [
            f"{name}={value} is less than 1" for name, value in numbers.items() if value < 1
        ]
        shares = {"validation_share": validation_share, "test_share": test_share}
        if min(shares.values()) < 0 or sum(shares.values()) >= 1:
            problems.append(f"{shares} are not shares that leave something to train on")
        if season > context:
            problems.append(f"season={season} is more than the context={context} that is seen")
        if problems:
            raise ConfigError(f"SeriesData cannot be made: {'; '.join(problems)}.")

    def values(self) -> Tensor:
        """Returns all steps, ``(steps, columns)``, float32, read on first use."""
        if self._values is None:
            hparams = self.hparams
            requested = {name: hparams[name] for name in ("encoding", "delimiter", "sheet")}
            source = Source(hparams["data"], "train", **requested)
            if not source.files():
                raise ConfigError(f"There is no file {hparams['data']!r}. Check the path.")
            rows = list(source.rows())
            if not rows:
                raise ConfigError(f"There are no rows in {hparams['data']!r}.")
            log_formats(describe_formats(source))
            self.columns = _columns(rows, hparams["columns"], hparams["time"])
            table, problems = _table(rows, self.columns)
            if hparams["time"] is not None:
                problems += _time_problems(rows, hparams["time"])
            if problems:
                raise ConfigError(
                    f"{hparams['data']!r} cannot be used. {describe(problems, len(rows))}"
                )
            self._values = torch.from_numpy(table)
        return self._values

    def borders(self) -> dict[str, tuple[int, int]]:
        """Returns the first step of each split and the one after its last."""
        steps = len(self.values())
        tested = steps - round(steps * self.hparams["test_share"])
        validated = tested - round(steps * self.hparams["validation_share"])
        return {
            "train": (0, validated),
            "validation": (validated, tested),
            "test": (tested, steps),
        }

    def statistics(self) -> Statistics:
        """Returns the statistics of the training steps."""
        train = self.values()[: self.borders()["train"][1]].double()
        change = (train[self.season :] - train[: -self.season]).abs().mean(0)
        return Statistics(train.mean(0).float(), train.std(0).float(), change.float())

    def setup(self, stage: str) -> None:
        """Checks the rows: refuses splits too short for one window, and columns without change."""
        hparams, borders = self.hparams, self.borders()
        short = [
            f"{split} has {end - first} steps"
            for split, (first, end) in borders.items()
            if (end > first or split == "train") and not len(self.windows(split))
        ]
        if short or borders["train"][1] <= self.season:
            raise ConfigError(
                f"{hparams['data']!r} has {len(self.values())} steps, too few for "
                f"context={hparams['context']}, horizon={hparams['horizon']} and "
                f"season={hparams['season']} in every split: "
                f"{', '.join(short) or 'train is shorter than a season'}. Lower these, change the "
                "shares, or set one to 0."
            )
        statistics = self.statistics()
        same = [
            name
            for name, std, error in zip(
                self.columns, statistics.std, statistics.naive_error, strict=True
            )
            if not std or not error
        ]
        if same:
            raise ConfigError(
                f"{', '.join(same)} in {hparams['data']!r}: every training step is what it was a "
                "season before, so there is nothing to learn. Leave the column out of columns=."
            )

    @property
    def record(self) -> dict[str, Any]:
        """What was read, for the record of a run: steps, splits and settings."""
        splits = {split: {"steps": end - first} for split, (first, end) in self.borders().items()}
        names = ("data", "context", "horizon", "season", "time")
        settings = {name: self.hparams[name] for name in names}
        return {**settings, "rows": len(self.values()), "columns": self.columns, "splits": splits}

    def windows(self, split: str) -> Windows:
        """Returns the windows of ``train``, ``validation`` or ``test``."""
        first, end = self.borders()[split]
        hparams = self.hparams
        return Windows(self.values(), first, end, hparams["context"], hparams["horizon"])

    def train_dataloader(self) -> Any:
        """Returns the windows of the training steps, in random order."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        """Returns the windows of the validation steps; an empty list where there are none."""
        return self._loader("validation")

    def test_dataloader(self) -> Any:
        """Returns the windows of the test steps; an empty list where there are none."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """Returns the one window that ends with the last row."""
        return DataLoader([{"past": self.values()[-self.hparams["context"] :]}])  # type: ignore[arg-type]

    def _loader(self, split: str, shuffle: bool = False) -> Any:
        windows = self.windows(split)
        if not len(windows):
            return []
        workers = self.hparams["num_workers"] or 0
        return DataLoader(
            windows,
            self.batch_size,
            shuffle=shuffle,
            num_workers=workers,
            worker_init_fn=lead_own_group,
        )


def _columns(rows: Sequence[Row], requested: list[str] | None, time: str | None) -> list[str]:
    first = rows[0].value or {}
    names = [*(requested or []), *([] if time is None else [time])]
    unknown = [
        f"{name!r} is not a column{similar_names(name, first)}"
        for name in names
        if name not in first
    ]
    found = requested or [
        n for n, value in first.items() if n != time and _number(value) is not None
    ]
    if unknown or not found:
        what = "; ".join(unknown) or "no column of the first row holds a number"
        raise ConfigError(
            f"There is nothing to forecast: {what}. The columns are {', '.join(first) or 'none'}."
        )
    return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _table(rows: Sequence[Row], columns: list[str]) -> tuple[Any, list[Problem]]:
    """Returns the values, ``(steps, columns)``, float32, and the rows that have none."""
    table = np.zeros((len(rows), len(columns)), dtype=np.float32)
    problems = []
    for step, row in enumerate(rows):
        if row.value is None:
            problems.append(Problem("unreadable", row.file, row.number, row.problem or ""))
            continue
        for place, name in enumerate(columns):
            number = _number(row.value.get(name))
            if number is None:
                details = f"has {row.value.get(name)!r} as {name}"
                problems.append(Problem("value", row.file, row.number, details))
            else:
                table[step, place] = number
    return table, problems


def _time_problems(rows: Sequence[Row], column: str) -> list[Problem]:
    """Returns the rows that do not come one step after the row before them."""
    values = [(row.value or {}).get(column) for row in rows]
    moments = np.array([_moment(value) for value in values])
    problems = [
        Problem("time", row.file, row.number, f"has {value!r} as {column}, which is not a time")
        for row, value, moment in zip(rows, values, moments, strict=True)
        if math.isnan(moment)
    ]
    gaps = np.diff(_in_months(moments))
    step = float(np.nanmedian(gaps)) if np.isfinite(gaps).any() else 0.0
    for place, gap in enumerate(gaps, start=1):
        if not math.isnan(gap) and not (gap > 0 and math.isclose(gap, step, rel_tol=1e-6)):
            details = (
                f"has {column} {values[place]!r} after {values[place - 1]!r}, not one step later"
            )
            problems.append(Problem("time", rows[place].file, rows[place].number, details))
    return problems


def _moment(value: Any) -> float:
    """Returns a number, or the seconds of a date such as ``2024-05-31``; NaN for anything else."""
    number = _number(value)
    if number is not None:
        return number
    try:
        moment = np.datetime64(str(value).strip().replace("/", "-"), "s")
    except ValueError:
        return math.nan
    return math.nan if np.isnat(moment) else float(moment.astype(np.int64))


def _in_months(moments: Any) -> Any:
    """Returns seconds as months where all are at one place of a month, else what was given."""
    dates = moments[np.isfinite(moments)].astype(np.int64).astype("datetime64[s]")
    months = dates.astype("datetime64[M]")
    # Months are not of one length, and no shorter step keeps its place in them.
    if len(dates) < 2 or len(set(dates - months)) > 1 or np.diff(months.astype(int)).min() < 1:
        return moments
    found = moments.copy()
    found[np.isfinite(moments)] = months.astype(int)
    return found

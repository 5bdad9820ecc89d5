"""Forecasting with a plain convolutional network, without transformers.

What a user's own LightningModule looks like to this package: it knows nothing of adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError

from lightning_peft.errors import CheckpointError, ConfigError, itemize
from lightning_peft.plugin.namespace import LateBoundMeta

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Base
else:
    _Base = object

# They belong to the series that is forecast, not to the weights.
_STATISTICS = ("mean", "std", "naive_error")


class Block(nn.Module):
    """Two dilated convolutions that see no later step, around which the input is added."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.first = nn.Conv1d(width, width, kernel_size=3, dilation=dilation)
        self.second = nn.Conv1d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``(batch, width, steps)`` for the same."""
        before = nn.functional.pad(x, (self.padding, 0))
        hidden: Tensor = self.second(nn.functional.gelu(self.first(before)))
        return x + hidden


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "loss": MeanMetric(),
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "mase": MeanMetric(),
            "mase_naive": MeanMetric(),
        }
    )


class Forecaster(_Base, metaclass=LateBoundMeta):
    """Forecasts each column of a series on its own, with one causal convolutional net for all.

    Logs ``val_loss`` (mean absolute error in standard deviations), ``val_mae`` and ``val_rmse`` (in
    the units of the data, over all columns), ``val_mase`` (the error in units of that of the naive
    forecast in the training steps; Hyndman and Koehler, 2006) and ``val_mase_naive`` (the same for
    the naive forecast itself, on these windows: what is to be beaten), and the same as
    ``test_...``.

    Args:
        horizon: Steps that are forecast; the same as in the data.
        width: Channels.
        blocks: Number of blocks, each with twice the dilation of the one before: together they see
            ``2 ** (blocks + 1) - 1`` steps.
        learning_rate: Of AdamW.
        checkpoint: Pretrained weights: safetensors, or a Trainer's checkpoint of this class
            without adapters. Its series may be other ones.
        columns: Names of the series; by default those of the data. They are kept in checkpoints.

    Raises:
        ConfigError: If the data has another horizon or other columns.
        CheckpointError: If the weights do not fit.
    """

    lightning_base = "core.module.LightningModule"
    mean: Tensor
    std: Tensor
    naive_error: Tensor

    def __init__(
        self,
        horizon: int = 8,
        width: int = 32,
        blocks: int = 5,
        learning_rate: float = 1e-3,
        checkpoint: str | None = None,
        columns: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Conv1d(1, width, kernel_size=1)
        self.blocks = nn.ModuleList(Block(width, 2**place) for place in range(blocks))
        self.head = nn.Linear(width, horizon)
        for name in _STATISTICS:
            self.register_buffer(name, torch.ones(len(columns or [])))
        self.season = 1
        self.metrics = _metrics()
        if checkpoint is not None:
            self._load(checkpoint)

    def _load(self, checkpoint: str) -> None:
        if not Path(checkpoint).is_file():
            raise ConfigError(f"checkpoint={checkpoint!r} is not a file. Check the path.")
        if checkpoint.endswith(".safetensors"):
            weights = load_file(checkpoint)
        else:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        weights = {name: value for name, value in weights.items() if name not in _STATISTICS}
        own = {n: value for n, value in self.state_dict().items() if n not in _STATISTICS}
        problems = [f"{name} is missing" for name in own if name not in weights]
        problems += [f"{name} is not a weight of this net" for name in weights if name not in own]
        problems += [
            f"{name} is {tuple(value.shape)}, and here {tuple(own[name].shape)}"
            for name, value in weights.items()
            if name in own and value.shape != own[name].shape
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint={checkpoint!r} does not fit width={self.hparams['width']}, blocks="
                f"{self.hparams['blocks']}, horizon={self.hparams['horizon']}:{itemize(problems)}"
                "\nGive the sizes of the net that wrote it."
            )
        self.load_state_dict(weights, strict=False)

    def setup(self, stage: str) -> None:
        """Takes names, scale and season of the series from the data's training steps.

        A checkpoint that is restored afterwards brings its own scale.
        """
        # Evaluation leaves metrics with tensors of inference mode, which a later fit cannot update.
        self.metrics = _metrics()
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "statistics"):
            return
        hparams = self.hparams
        if data.horizon != hparams["horizon"]:
            raise ConfigError(
                f"Forecaster(horizon={hparams['horizon']}) and the data with "
                f"horizon={data.horizon} do not fit. Give the same to both."
            )
        statistics = data.statistics()
        if hparams["columns"] not in (None, data.columns):
            raise ConfigError(
                f"Forecaster was made for the columns {', '.join(hparams['columns'])}, and the "
                f"data has {', '.join(data.columns)}. Name the same ones in the same order with "
                "columns="
            )
        hparams["columns"], self.season = list(data.columns), data.season
        for name in _STATISTICS:
            setattr(self, name, getattr(statistics, name).to(self.device))

    def forward(self, past: Tensor) -> Tensor:
        """Returns the forecast ``(batch, horizon, columns)`` for ``(batch, context, columns)``."""
        rows, steps, columns = past.shape
        scaled = ((past - self.mean) / self.std).transpose(1, 2).reshape(-1, 1, steps)
        hidden = self.stem(scaled)
        for block in self.blocks:
            hidden = block(hidden)
        # The net says how the future differs from the last step.
        change = self.head(hidden[..., -1]) + scaled[..., -1]
        return change.reshape(rows, columns, -1).transpose(1, 2) * self.std + self.mean

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean absolute error in standard deviations."""
        loss = ((self(batch["past"]) - batch["future"]).abs() / self.std).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        past, future = batch["past"], batch["future"]
        forecast = self(past)
        error = (forecast - future).abs()
        # Step h of the naive forecast is the last known value at the same place of the season.
        places = torch.arange(future.shape[1], device=past.device) % self.season - self.season
        naive = (past[:, places + past.shape[1]] - future).abs()
        known: Any = self.metrics
        known["loss"].update(error / self.std)
        known["mae"].update(forecast.flatten(), future.flatten())
        known["rmse"].update(forecast.flatten(), future.flatten())
        known["mase"].update(error / self.naive_error)
        known["mase_naive"].update(naive / self.naive_error)
        for name, metric in known.items():
            self.log(f"{stage}_{name}", metric, on_epoch=True, prog_bar=name == "loss")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Evaluates a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Evaluates a batch."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Returns the forecast of each window, by column."""
        names = self.hparams["columns"]
        return [dict(zip(names, row.T.tolist(), strict=True)) for row in self(batch["past"])]

    def configure_optimizers(self) -> Any:
        """Returns AdamW over what requires gradients."""
        parameters = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.hparams["learning_rate"])

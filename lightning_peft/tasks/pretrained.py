"""Base class of tasks: one transformers model, its optimizer and evaluation."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from transformers import AutoConfig

from lightning_peft import engine
from lightning_peft.compat.lightning import trainer_of
from lightning_peft.data.vocabulary import check_vocabulary
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import LateBoundMeta
from lightning_peft.tasks.step_mean import StepMean

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule as _Base
    from transformers import PretrainedConfig, PreTrainedModel
else:
    _Base = object

Schedule = Literal["cosine", "linear", "constant"]


class PretrainedTask(_Base, metaclass=LateBoundMeta):
    """A transformers model and what it is trained for.

    The model is loaded in ``configure_model``, so that nothing is in memory before the Trainer
    runs. It knows nothing of adapters: those come with the strategy.

    Args:
        model: Name on the hub, or folder, of a transformers model; or a GGUF file, such as
            ``"folder/model.gguf"`` or ``"org/name-GGUF:model.Q4_K_M.gguf"``.
        learning_rate: Peak learning rate of AdamW, reached after the warm-up; 2e-4 is usual for
            adapters of large models.
        weight_decay: Decoupled weight decay.
        warmup: Share of the steps in which the rate rises linearly.
        schedule: How the rate goes on from there: falling as a cosine or linearly to zero, or
            constant.
        dtype: Dtype that the weights are loaded in, such as ``"float32"``; ``"auto"`` takes that
            of the file.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run the model's own code from the hub; only together with ``revision``.
        config: Fields of a transformers configuration with its ``model_type``. The model is then
            built from it with random weights, the same each time, and ``model`` is not loaded: for
            trials and tests without a network.
        average_across_step: Make gradients and ``train_...`` values one mean over all tokens (or
            rows, where the loss is a mean over rows) of an optimizer step. ``False`` leaves
            accumulated batches and processes to Lightning, which takes the mean of their means.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    lightning_base = "core.module.LightningModule"
    # transformers' class that loads the model.
    auto_class: ClassVar[Any]
    # Further arguments of its from_pretrained.
    loading: ClassVar[dict[str, Any]] = {}
    # Whether the loss of a row depends on the other rows of its batch.
    couples_rows: ClassVar[bool] = False
    # Arguments that are above 0, where they are given, and the least values of others.
    positive: ClassVar[tuple[str, ...]] = ("learning_rate",)
    least: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        model: str,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.001,
        warmup: float = 0.03,
        schedule: Schedule = "cosine",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        config: dict[str, Any] | None = None,
        average_across_step: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.step_mean = StepMean()
        self.model: PreTrainedModel | None = None
        # The data whose tokens were compared with the model's embeddings.
        self._vocabulary_checked: object = None
        self.metrics = MetricCollection(self.make_metrics(), compute_groups=False)
        problems = self._argument_problems()
        if problems:
            raise ConfigError(f"{type(self).__name__} cannot be made: {'; '.join(problems)}.")

    def _argument_problems(self) -> list[str]:
        """Returns the problems of the arguments; subclasses add theirs."""
        hparams = self.hparams
        problems = [
            f"{name}={hparams[name]} is not above 0"
            for name in self.positive
            if hparams[name] is not None and hparams[name] <= 0
        ]
        problems += [
            f"{name}={hparams[name]} is less than {least}"
            for name, least in self.least.items()
            if hparams[name] < least
        ]
        if not 0 <= hparams["warmup"] < 1:
            problems.append(
                f"warmup={hparams['warmup']} is a share of the steps, from 0 to below 1"
            )
        if hparams["trust_remote_code"] and hparams["revision"] is None:
            problems.append(
                "trust_remote_code=True runs whatever code the repository holds at that moment; "
                "read it, and name the commit that you have read with revision="
            )
        if hparams["config"] is not None and "model_type" not in hparams["config"]:
            problems.append(f"config={hparams['config']!r} has no model_type, such as 'llama'")
        return problems

    @abstractmethod
    def make_metrics(self) -> dict[str, Any]:
        """Returns the torchmetrics by the names under which they are logged after the stage."""

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""

    @abstractmethod
    def evaluate(self, batch: Any) -> None:
        """Updates the metrics with a batch."""

    def results(self) -> dict[str, Any]:
        """Returns the value of each metric over all batches that were evaluated."""
        return self.metrics.compute()

    def configuration(self) -> dict[str, Any]:
        """Returns fields that the model's configuration gets, such as the names of its labels."""
        return {}

    def configure_model(self) -> None:
        """Loads the model, or builds it from ``config``; once."""
        if self.model is None:
            self.model = self._load() if self.hparams["config"] is None else self._build()
            self.prepare_model(self.model)

    def prepare_model(self, model: Any) -> None:
        """Changes the model that was just loaded or built; subclasses extend it."""

    def _load(self) -> PreTrainedModel:
        hparams = self.hparams
        names = ("dtype", "revision", "trust_remote_code")
        options = {name: hparams[name] for name in names} | self.loading | self.configuration()
        return engine.load_pretrained_model(self.auto_class, hparams["model"], **options)

    def _build(self) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            # A base that is to be the same when the run is resumed.
            torch.manual_seed(0)
            model: PreTrainedModel = self.auto_class.from_config(self.model_config())
        return model

    def model_config(self) -> PretrainedConfig:
        """Returns the configuration of the model, without loading its weights."""
        built, own = self.hparams["config"], self.configuration()
        return self.base_config(**own) if built is None else AutoConfig.for_model(**built | own)

    def base_config(self, **fields: Any) -> PretrainedConfig:
        """Returns the configuration in the files of the base, with other ``fields``."""
        names = ("revision", "trust_remote_code")
        options = {name: self.hparams[name] for name in names}
        config: PretrainedConfig = engine.load_config(self.hparams["model"], **options, **fields)
        return config

    @property
    def _datamodule(self) -> Any:
        # Lightning's property raises where there is no Trainer.
        return getattr(trainer_of(self), "datamodule", None)

    def on_fit_start(self) -> None:
        """Checks the tokens of the data, and ends ``from_pretrained``'s eval mode."""
        assert self.model is not None
        self.check_tokens()
        self.model.train()

    def on_validation_start(self) -> None:
        """Checks the tokens of the data."""
        self.check_tokens()

    on_test_start = on_predict_start = on_validation_start

    def check_tokens(self) -> None:
        """Checks, once, that the model has an embedding for every token of the data module."""
        data = self._datamodule
        if data is self._vocabulary_checked or self.model is None:
            return
        try:
            rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        # Of models that read no tokens.
        except (NotImplementedError, AttributeError):
            rows = None
        if rows is not None:
            check_vocabulary(data, rows, str(self.hparams["model"]))
        self._vocabulary_checked = data

    def forward(self, **batch: Any) -> Any:
        """Returns the model's output."""
        assert self.model is not None
        return self.model(**batch)

    def log_training(
        self, batch_idx: int, means: dict[str, Tensor], items: Tensor, rows: int
    ) -> None:
        """Logs ``train_...`` values of a batch, and weights its gradient by its items.

        Args:
            batch_idx: Number of the batch in the epoch.
            means: Means over the items, by name, ``loss`` among them; scalars.
            items: Labelled tokens, or rows, that they are means over; a scalar.
            rows: Rows of the batch.
        """
        trainer: Any = trainer_of(self)
        means_of_step = means
        if trainer is not None and self.hparams["average_across_step"]:
            # By the rule by which Lightning sets gradients to zero.
            if batch_idx % trainer.accumulate_grad_batches == 0:
                self.step_mean.reset()
            means_of_step = self.step_mean.add(
                items, means, lambda t: trainer.strategy.reduce(t, None, "sum")
            )
        for name, value in means_of_step.items():
            self.log(
                f"train_{name}", value.detach().float(), prog_bar=name == "loss", batch_size=rows
            )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Propagates the loss, weighted by the items of its batch."""
        super().backward(self.step_mean.weighted(loss), *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps with the mean gradient over all items of the step."""
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        closure = self.step_mean.around(optimizer_closure, optimizer, shares)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates a batch."""
        self.evaluate(batch)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs every metric as ``val_...``."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """Logs every metric as ``test_...``."""
        self._log_results("test")

    def _log_results(self, stage: str) -> None:
        for name, value in self.results().items():
            # The metrics are those of all processes already; Lightning would warn.
            self.log(f"{stage}_{name}", value, prog_bar=name == "loss", sync_dist=True)
        # Tensors made in Lightning's inference mode could not be updated when training follows.
        with torch.inference_mode(False):
            self.metrics.reset()

    def configure_optimizers(self) -> Any:
        """Returns AdamW over what requires gradients, with warm-up and schedule by step."""
        optimizer = torch.optim.AdamW(
            [param for param in self.parameters() if param.requires_grad],
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        factor = rate_factor(self.hparams["schedule"], steps, self.hparams["warmup"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }


def rate_factor(schedule: Schedule, steps: int, warmup: float) -> Any:
    """Returns the factor of the peak learning rate as a function of the step.

    It rises linearly in the share ``warmup`` of all steps; in one step at least.
    """
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule == "linear" else 1.0

    return factor

"""Shared parts of encoder-decoder tasks: loss, generation and text metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.text import (
    CharErrorRate,
    CHRFScore,
    ROUGEScore,
    SacreBLEUScore,
    WordErrorRate,
)
from transformers import AutoModelForSeq2SeqLM

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.end_tokens import end_tokens
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.generation import generate
from lightning_peft.tasks.pretrained import PretrainedTask
from lightning_peft.tasks.samples import GeneratedSample

TextMetric = Literal["rouge", "bleu", "chrf", "wer", "cer"]
# Trained in bfloat16 or float32: their activations are larger than float16 can hold.
_NO_FLOAT16 = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
_FLOAT16 = ("16-mixed", "16-true", "float16", "torch.float16", "half")


def _letters(text: str) -> str:
    # torchmetrics' own keeps a to z alone, so that other alphabets would score nothing.
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


# rougeLsum and stemming need data that is downloaded while a run goes on; they are left out.
METRICS: dict[TextMetric, Callable[[], Metric]] = {
    "rouge": lambda: ROUGEScore(
        normalizer=_letters, tokenizer=str.split, rouge_keys=("rouge1", "rouge2", "rougeL")
    ),
    "bleu": SacreBLEUScore,
    "chrf": lambda: CHRFScore(n_word_order=0),
    "wer": WordErrorRate,
    "cer": CharErrorRate,
}
_SEVERAL_REFERENCES = (SacreBLEUScore, CHRFScore)


def update(metric: Metric, generated: Sequence[str], expected: Sequence[str]) -> None:
    """Adds texts to a metric."""
    several = isinstance(metric, _SEVERAL_REFERENCES)
    metric.update(list(generated), [[text] for text in expected] if several else list(expected))


def named(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the results with F-measures under the metric's own name, and nothing else of it."""
    return {
        name.removesuffix("_fmeasure"): value
        for name, value in results.items()
        if not name.endswith(("_precision", "_recall"))
    }


class EncoderDecoderTask(PretrainedTask):
    """A model whose decoder writes a text of what its encoder takes in.

    Args:
        model: As of :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
        metrics: Metrics of generated text, any of ``"rouge"``, ``"bleu"``, ``"chrf"``, ``"wer"``
            and ``"cer"``; by default what is usual for the task.
        generate_limit: Rows of each evaluation for which text is generated, the first ones, on
            each device: generating takes far longer than the loss. 0 leaves these metrics out.
        max_new_tokens: Longest generation in tokens.
        **options: Keyword arguments of ``PretrainedTask``.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    # What of a batch the encoder takes.
    encoder_inputs: ClassVar[tuple[str, ...]]
    metrics_by_default: ClassVar[tuple[TextMetric, ...]]
    least = {"generate_limit": 0, "max_new_tokens": 1}

    def __init__(
        self,
        model: str,
        metrics: list[TextMetric] | None = None,
        generate_limit: int = 64,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._generated = 0

    def _argument_problems(self) -> list[str]:
        problems = super()._argument_problems()
        unknown = [name for name in self.hparams["metrics"] or () if name not in METRICS]
        if unknown:
            problems.append(f"metrics={unknown} are none of {', '.join(METRICS)}")
        return problems

    @property
    def text_metrics(self) -> list[TextMetric]:
        """The metrics of generated text that are evaluated."""
        requested = self.hparams["metrics"]
        names = self.metrics_by_default if requested is None else requested
        limit: int = self.hparams["generate_limit"]
        return [name for name in names if name in METRICS and limit > 0]

    def generation(self) -> dict[str, Any]:
        """Returns the data's arguments for ``generate``: a language."""
        settings: dict[str, Any] = getattr(self._datamodule, "generation", {})
        return settings

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over labelled tokens, and the metrics of text."""
        metrics: dict[str, Any] = {"loss": MeanMetric(), "token_accuracy": MeanMetric()}
        return metrics | {name: METRICS[name]() for name in self.text_metrics}

    def setup(self, stage: str) -> None:
        """Refuses a precision that overflows, and generated text without a tokenizer."""
        kind = self.model_config().model_type
        narrow = [p for p in (self.trainer.precision, self.hparams["dtype"]) if p in _FLOAT16]
        if kind in _NO_FLOAT16 and narrow:
            raise UnsupportedError(
                f"{self.hparams['model']!r} is a {kind} model, and the run is in {narrow[0]!r}: "
                "activations of T5 overflow float16, and the loss becomes NaN or wrong. Use "
                "Trainer(precision='bf16-mixed'), or '32-true' where the GPU has no bfloat16."
            )
        if self.text_metrics and not hasattr(self._datamodule, "tokenizer"):
            raise ConfigError(
                f"metrics={self.text_metrics} are of generated text, and the Trainer has no "
                "datamodule with a tokenizer to write it with. Fit with a data module of this "
                "package, or set generate_limit=0."
            )

    def forward(self, **batch: Any) -> Any:
        """Returns the model's output; tokens that are all there need no cache of earlier ones."""
        return super().forward(use_cache=False, **batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean loss over the labelled tokens of ``batch``."""
        loss: Tensor = self(**_tensors(batch)).loss
        labels = batch["labels"]
        self.log_training(batch_idx, {"loss": loss}, (labels != IGNORED).sum(), len(labels))
        return loss

    def _count_from_zero(self) -> None:
        self._generated = 0

    on_validation_epoch_start = on_test_epoch_start = _count_from_zero

    def evaluate(self, batch: dict[str, Any]) -> None:
        """Adds the labelled tokens of ``batch``, and texts for as many rows as are asked for."""
        output = self(**_tensors(batch))
        labels = batch["labels"]
        labelled = labels != IGNORED
        correct = output.logits.argmax(-1)[labelled] == labels[labelled]
        self.metrics["loss"].update(output.loss, labelled.sum())
        self.metrics["token_accuracy"].update(correct)
        left = self.hparams["generate_limit"] - self._generated
        if not self.text_metrics or left <= 0:
            return
        first = {name: batch[name][:left] for name in (*self._inputs_of(batch), "target")}
        texts = self.generate_texts(first, self.hparams["max_new_tokens"])
        self._generated += len(texts)
        for name in self.text_metrics:
            update(self.metrics[name], texts, first["target"])

    def results(self) -> dict[str, Any]:
        """Returns loss, perplexity, token accuracy, and the metrics of text."""
        metrics = named(super().results())
        return {**metrics, "perplexity": torch.exp(metrics["loss"])}

    def _inputs_of(self, batch: dict[str, Any]) -> list[str]:
        return [name for name in self.encoder_inputs if name in batch]

    def generate_texts(self, batch: dict[str, Any], max_new_tokens: int) -> list[str]:
        """Returns the model's greedy output for each row of ``batch``."""
        assert self.model is not None
        tokenizer = self._datamodule.tokenizer
        ends = end_tokens(self.model, tokenizer)
        # Whisper compares with one number.
        end = ends[0] if len(ends) == 1 else ends or None
        tokens = generate(
            self.model,
            {name: batch[name] for name in self._inputs_of(batch)},
            max_new_tokens=max_new_tokens,
            **{"eos_token_id": end, **self.generation()},
        )
        texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's output for ``rows`` of the data module."""
        batch = self._datamodule.collator()(rows)
        texts = self.generate_texts(batch, max_new_tokens)
        return [
            GeneratedSample(source, target, text)
            for source, target, text in zip(batch["source"], batch["target"], texts, strict=True)
        ]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Returns source, target and what the model writes, for each row."""
        texts = self.generate_texts(batch, self.hparams["max_new_tokens"])
        rows = zip(batch["source"], batch["target"], texts, strict=True)
        return [dict(zip(("source", "target", "prediction"), row, strict=True)) for row in rows]


class Seq2SeqLM(EncoderDecoderTask):
    """An encoder-decoder language model that is trained to write targets of sources.

    Logs ``val_loss`` (nats per target token, the end token among them), ``val_perplexity`` (its
    exponential), ``val_token_accuracy`` (share of target tokens that are the most likely one), and
    of generated text what ``metrics`` requests: ``val_rouge1``, ``val_rouge2`` and ``val_rougeL``
    (F-measures), ``val_bleu``, ``val_chrf``, each from 0 to 1; and the same as ``test_...``.

    The arguments are those of
    :class:`EncoderDecoderTask <lightning_peft.tasks.encoder_decoder.EncoderDecoderTask>` and
    :class:`PretrainedTask <lightning_peft.tasks.pretrained.PretrainedTask>`.
    """

    auto_class = AutoModelForSeq2SeqLM
    metrics_by_default = ("rouge",)
    encoder_inputs = ("input_ids", "attention_mask")


def _tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    # The texts of the rows are for metrics and samples, not for the model.
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

"""Reward models, trained on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from lightning_peft.errors import ConfigError
from lightning_peft.tasks.heads import keep_heads_in_float32
from lightning_peft.tasks.pairwise import PairwiseTask


class RewardModel(PairwiseTask):
    """A decoder with one output, trained so that chosen answers get greater scores.

    The loss is that of Bradley and Terry: minus the log-sigmoid of the difference of the scores
    (arXiv 2203.02155, equation 1). The score of a text is read at its last token, the end of the
    answer. The output layer is new, so it trains in full next to any adapters.

    Logs, as means over pairs, ``val_loss``, ``val_accuracy`` (share of pairs in which the chosen
    answer has the greater score), ``val_margin``, ``val_chosen_score`` and
    ``val_rejected_score``; the same as ``train_...`` and ``test_...``. ``predict`` gives the same
    for each pair.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        margin: By how much a chosen answer's score is to exceed the rejected one's before the loss
            treats them as equal (arXiv 2307.09288, equation 2, with one margin for all pairs).
        learning_rate: Peak learning rate of AdamW.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    auto_class = AutoModelForSequenceClassification
    least = {"margin": 0}

    def __init__(
        self, model: str, margin: float = 0.0, learning_rate: float = 1e-4, **options: Any
    ) -> None:
        super().__init__(model, learning_rate, **options)

    def configuration(self) -> dict[str, Any]:
        """Returns one output."""
        return {"num_labels": 1}

    def prepare_model(self, model: Any) -> None:
        """Puts the output in float32, and chooses a padding token that ends no answer."""
        keep_heads_in_float32(model)
        chosen = padding_token(model.config.get_text_config())
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = chosen

    def compared(self) -> tuple[str, ...]:
        """Returns the names of what is measured."""
        return ("loss", "accuracy", "margin", "chosen_score", "rejected_score")

    def compare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the loss and what else is measured of each pair of ``batch``."""
        chosen, rejected = self.scores(batch).chunk(2)
        margin = chosen - rejected
        return {
            "loss": -logsigmoid(margin - self.hparams["margin"]),
            "accuracy": (margin > 0).float(),
            "margin": margin,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the score of each row, ``(rows,)``, float32; rows are padded on the right."""
        assert self.model is not None
        config: Any = self.model.config
        filler = config.get_text_config().pad_token_id
        mask = batch["attention_mask"]
        # transformers reads the score at the last token that is not this one, whatever the mask
        # says; the data may pad with another, such as the end token.
        ids = batch["input_ids"].masked_fill(mask == 0, filler)
        last = ids.gather(1, mask.sum(1, keepdim=True) - 1)
        if bool((last == filler).any()):
            raise ConfigError(
                f"A row ends with token {filler}, which pads in {self.hparams['model']!r}: its "
                "score would be read at another token. Take special tokens out of the answers."
            )
        logits: Tensor = self(input_ids=ids, attention_mask=mask).logits
        return logits[:, 0].float()


def padding_token(config: Any) -> int:
    """Returns the padding token of a configuration, or another one that does not end answers."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    names = ("pad_token_id", "bos_token_id")
    candidates = [getattr(config, name, None) for name in names]
    usable = [token for token in [*candidates, *range(len(ends) + 1)] if token is not None]
    return next(token for token in usable if token not in ends and token >= 0)

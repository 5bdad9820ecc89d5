"""Tokenized rows whose labels have names: which there are, and how often each comes."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_peft.data.labels import LabelNames, label_notes, label_problems, similar_labels
from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens
from lightning_peft.data.shapes import Layout
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class LabelledRows(RowEncoder):
    """Encodes rows whose labels are collected, and cuts longer rows or refuses them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        names: LabelNames,
        max_length: int,
        truncate: bool,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.names, self.max_length, self.truncate = names, max_length, truncate
        self.special_tokens = SpecialTokens(tokenizer)

    def too_long(self, length: int) -> EncodingProblem:
        """Returns the problem of a row of ``length`` tokens."""
        return EncodingProblem(
            "long", f"has {length:,} tokens, and {self.max_length:,} are allowed"
        )

    def summary(self) -> dict[str, Any]:
        """Returns the names of all labels."""
        return {"labels": self.names.names()}


class LabelledData(TokenizedData):
    """Rows with named labels, which a tokenizer encodes.

    Args:
        data: As of :class:`RowDataModule <lightning_peft.data.row_data_module.RowDataModule>`.
        tokenizer: As of :class:`TokenizedData <lightning_peft.data.tokenized.TokenizedData>`.
        labels: All names in the order of their numbers; by default those in the rows, sorted.
        **options: Keyword arguments of both.

    Raises:
        ConfigError: If arguments contradict each other, or the data cannot be used.
    """

    # Our name of the field that holds the labels.
    label_field: ClassVar[str] = "label"
    row_encoder: ClassVar[type[LabelledRows]]

    def __init__(
        self,
        data: str,
        tokenizer: str,
        labels: list[str] | None = None,
        over_long: Literal["error", "truncate"] = "error",
        **options: Any,
    ) -> None:
        self._notes_logged = False
        super().__init__(data, tokenizer, over_long=over_long, **options)

    def _argument_problems(self) -> list[str]:
        return [*super()._argument_problems(), *label_problems(self.hparams["labels"])]

    def encoder_for(self, layout: Layout) -> RowEncoder:
        """Returns the encoder of texts with labels."""
        names = LabelNames(self.hparams["labels"])
        truncate = self.hparams["over_long"] == "truncate"
        return self.row_encoder(self.tokenizer, names, self.max_length, truncate)

    @abstractmethod
    def label_counts(self, split: str) -> dict[str, int]:
        """Returns how often each label is in a split with rows."""

    @property
    def labels(self) -> list[str]:
        """The names of all labels, in the order of their numbers."""
        found: list[str] = self.read().summary["labels"]
        return found

    @property
    def classes(self) -> dict[str, dict[str, int]]:
        """How often each label is in each split with rows."""
        splits = {split: self.label_counts(split) for split in self.read().splits}
        return {
            split: {name: counts.get(name, 0) for name in self.labels}
            for split, counts in splits.items()
        }

    def encoding(self) -> dict[str, Any]:
        """Returns the names that are given as well."""
        return {**super().encoding(), "labels": self.hparams["labels"]}

    @property
    def record(self) -> dict[str, Any]:
        """What was prepared, for the record of a run, with the rows of each class."""
        return {**super().record, "classes": self.classes, "notes": self.notes}

    @property
    def notes(self) -> list[str]:
        """What of the labels cannot be learnt, or is not measured, as sentences."""
        splits = self.read().summary["splits"].items()
        counts = {split: counts.get("contradictions", 0) for split, counts in splits}
        contradictions = [
            f"{count:,} rows of {split} have the text of an earlier row and another label."
            for split, count in counts.items()
            if count
        ]
        return [*label_notes(self.labels, self.classes), *contradictions]

    def setup(self, stage: str) -> None:
        """Opens the prepared rows, and checks that their labels can be distinguished.

        Raises:
            ConfigError: With all that is wrong with the rows, unless they are to be skipped, or
                if their labels leave nothing to learn.
        """
        super().setup(stage)
        self._check_labels()
        if not self._notes_logged and (self.trainer is None or self.trainer.is_global_zero):
            self._notes_logged = True
            for note in self.notes:
                log.warning(note)

    def _check_labels(self) -> None:
        hparams = self.hparams
        trained = [name for name, count in self.classes["train"].items() if count]
        if len(trained) < 2:
            raise ConfigError(
                f"Every label to train on in {hparams['data']!r} is {trained[0]!r}: a model that "
                "always says the same learns nothing. Add rows of other classes, or say which "
                f'column holds them, such as columns={{"{self.label_field}": "my_column"}}.'
            )
        alike = similar_labels(self.labels) if hparams["labels"] is None else []
        if alike:
            groups = "; ".join(" and ".join(map(repr, group)) for group in alike)
            raise ConfigError(
                f"Some labels in {hparams['data']!r} differ in case or blanks only, and would be "
                f"classes of their own: {groups}. Write them alike in the rows, or name all labels "
                "with labels= if they are meant."
            )

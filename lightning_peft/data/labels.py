"""Label names: validation, similar names, and rows with labels."""

from __future__ import annotations

import logging
import re
import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning_peft.data.file_format import ClassName
from lightning_peft.data.row_encoder import RowEncoder, TokenizedRows
from lightning_peft.data.shapes import Layout
from lightning_peft.data.tokenized import TokenizedData
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, similar_names

_SHOWN = 20
# A whole number with zeros before it, or as a decimal number.
_NUMBER = re.compile(r"\A(-?)0*(\d+)(?:\.0*)?\Z")

log = logging.getLogger(__name__)


class LabelNames:
    """Collects the labels of rows, or checks them against ``fixed_names``, all names in order."""

    def __init__(self, fixed_names: Sequence[str] | None) -> None:
        self.fixed_names = list(fixed_names) if fixed_names is not None else None
        # Numbers stand for names unless they are names.
        self.by_number = fixed_names is not None and not any(map(str.isdecimal, fixed_names))
        self.seen: set[str] = set()

    def find(self, label: str, what: str = "label") -> str:
        """Returns the name of a label in a row: a name, or a number in the order of the names."""
        if self.fixed_names is None and label == "-100":
            raise EncodingProblem(
                "label",
                f"has the {what} -100, by which programs mark what is not trained: leave it out, "
                "or name all labels with labels=",
            )
        if self.fixed_names is None or label in self.fixed_names:
            return str(label)
        if isinstance(label, ClassName) and (own := self._own_name(label)) is not None:
            return own
        if self.by_number and label.isdecimal() and int(label) < len(self.fixed_names):
            return self.fixed_names[int(label)]
        raise EncodingProblem(
            "label",
            f"has the {what} {label!r}, which is none of the {len(self.fixed_names)} that are given"
            + similar_names(label, self.fixed_names),
        )

    def _own_name(self, label: ClassName) -> str | None:
        """Returns the name that ``labels=`` gives to the number of a class."""
        ours = self.fixed_names or []
        if str(label.number) in ours:
            return str(label.number)
        # A name that both have indicates whether they have the same order.
        same = len(ours) == len(label.names) and all(
            name not in ours or name == own for name, own in zip(label.names, ours, strict=True)
        )
        return ours[label.number] if same else None

    def add(self, names: Iterable[str]) -> None:
        """Adds names of a row that is used."""
        self.seen.update(names)

    def names(self) -> list[str]:
        """Returns all names, in the order of their numbers."""
        return sort_labels(self.seen) if self.fixed_names is None else self.fixed_names


def sort_labels(names: Iterable[str]) -> list[str]:
    """Returns names sorted; by their values where all are whole numbers."""
    found = list(names)
    numbers = all(name.removeprefix("-").isdecimal() for name in found)
    return sorted(found, key=lambda name: (int(name) if numbers else 0, name))


def label_problems(labels: Sequence[str] | None) -> list[str]:
    """Returns the problems of names that the user gives."""
    if labels is None:
        return []
    twice = [name for name, count in Counter(labels).items() if count > 1]
    problems = [f"labels={list(labels)} holds {name!r} more than once" for name in twice]
    if any(not name.strip() for name in labels):
        problems.append(f"labels={list(labels)} holds an empty name")
    if len(labels) < 2:
        problems.append(f"labels={list(labels)} leaves nothing to tell apart")
    return problems


def similar_labels(names: Sequence[str]) -> list[list[str]]:
    """Returns groups of names that differ in case, blanks, ``_`` and ways to write a character.

    Whole numbers may differ in zeros: columns with gaps hold 1 as 1.0.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        # An accent is a character of its own, or not, by the program that wrote it.
        plain = unicodedata.normalize("NFC", name).casefold().replace("_", " ")
        plain = "".join(plain.split())
        groups.setdefault(_NUMBER.sub(r"\1\2", plain), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def label_notes(names: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Returns sentences on labels that are not trained or evaluated, from counts by split."""
    train = counts.get("train", {})
    found = []
    for split, of in counts.items():
        new = [name for name in names if of.get(name) and not train.get(name)]
        if new:
            rows = sum(of[name] for name in new)
            found.append(
                f"{_listed(new)} {_are(new)} in {split} ({rows:,} times) and never in train, so "
                "the model cannot learn to say so."
            )
    absent = [name for name in names if not any(of.get(name) for of in counts.values())]
    if absent:
        found.append(f"{_listed(absent)} {_are(absent)} given and in no row.")
    for split in ("validation", "test"):
        seen = counts.get(split, {})
        missing = [name for name in names if train.get(name) and not seen.get(name)]
        if seen and missing:
            found.append(f"{_listed(missing)} {_are(missing)} in train and not in {split}.")
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{'Label' if len(names) == 1 else 'Labels'} {shown}{rest}"


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


class LabelledRows(TokenizedRows):
    """Encodes rows whose labels are collected."""

    parallelizable = True

    def __init__(self, names: LabelNames, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.names = names

    def summary(self) -> dict[str, Any]:
        return {"labels": self.names.names()}


class LabelledData(TokenizedData):
    """Rows with named labels, which a tokenizer encodes."""

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
        names = LabelNames(self.hparams["labels"])
        truncate = self.hparams["over_long"] == "truncate"
        return self.row_encoder(names, self.tokenizer, self.max_length, truncate)

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
        """Opens the prepared rows, and checks that their labels can be distinguished."""
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
                f"Some labels in {hparams['data']!r} differ in case, blanks, zeros or the bytes "
                f"of an accent only, and would be classes of their own: {groups}. Write them alike "
                "in the rows, or name all labels with labels= if they are meant."
            )

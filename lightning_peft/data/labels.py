"""The names of all labels: given, or found in the rows; and what of them cannot be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import similar_names

_SHOWN = 20


class LabelNames:
    """Collects the labels of rows, or checks them against ``fixed_names``, all names in order."""

    def __init__(self, fixed_names: Sequence[str] | None) -> None:
        self.fixed_names = list(fixed_names) if fixed_names is not None else None
        # Numbers stand for names unless they are names.
        self.by_number = fixed_names is not None and not any(name.isdigit() for name in fixed_names)
        self.seen: set[str] = set()

    def find(self, label: str, what: str = "label") -> str:
        """Returns the name of a label in a row: a name, or a number in the order of the names.

        Raises:
            EncodingProblem: If it is not one of the names that were given.
        """
        if self.fixed_names is None or label in self.fixed_names:
            return label
        if self.by_number and label.isdigit() and int(label) < len(self.fixed_names):
            return self.fixed_names[int(label)]
        raise EncodingProblem(
            "label",
            f"has the {what} {label!r}, which is none of the {len(self.fixed_names)} that are given"
            + similar_names(label, self.fixed_names),
        )

    def add(self, names: Iterable[str]) -> None:
        """Adds names of a row that is used."""
        self.seen.update(names)

    def names(self) -> list[str]:
        """Returns all names, in the order of their numbers."""
        return sort_labels(self.seen) if self.fixed_names is None else self.fixed_names


def sort_labels(names: Iterable[str]) -> list[str]:
    """Returns names sorted; by their values where all are whole numbers."""
    found = list(names)
    numbers = all(name.lstrip("-").isdecimal() for name in found)
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
    """Returns groups of names that differ in case, blanks and ``_`` only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().replace("_", " ").split()), []).append(name)
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

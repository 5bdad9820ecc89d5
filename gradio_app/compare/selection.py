"""Selection of the runs to compare, from a URL, limited to those the visitor may see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradio_app.errors import UserError
from gradio_app.guards import shortened
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run

MAX_RUNS = 4
LETTERS = "ABCD"


@dataclass(frozen=True)
class RunSelection:
    """The runs that are compared, in the order in which they were named, and missing ones."""

    runs: tuple[Run, ...] = ()
    missing: tuple[str, ...] = ()
    too_many: bool = False

    @property
    def labels(self) -> list[str]:
        """What each run is called: a letter tells two of the same name apart."""
        return [f"{letter} {run.name}" for letter, run in zip(LETTERS, self.runs, strict=False)]


def parse_ids(text: str) -> list[str]:
    """Returns the ids that an address names, ``a,b,c``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def select_runs(store: RunStore, owner: str, ids: Iterable[object]) -> RunSelection:
    """Returns the runs of an owner among those that are named."""
    wanted = list(dict.fromkeys(str(one) for one in ids))
    found, missing = [], []
    for name in wanted[:MAX_RUNS]:
        try:
            found.append(store.get(owner, name))
        except UserError:
            missing.append(shortened(name))
    return RunSelection(tuple(found), tuple(missing), len(wanted) > MAX_RUNS)

"""Search, filters, sorting and pagination of the table of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradio_app.experiments.summaries import Summaries, Summary
from gradio_app.runs.types import Run

PER_PAGE = 10
MAX_SEARCH = 200
MAX_PICKED = 100
STATES: Mapping[str, frozenset[str]] = {
    "all": frozenset(),
    "active": frozenset({"preparing", "running", "stopping"}),
    "finished": frozenset({"finished"}),
    "stopped": frozenset({"stopped", "queued"}),
    "failed": frozenset({"failed", "crashed"}),
}
SORTS = ("name", "state", "model", "data", "method", "best", "time", "memory", "when")
# Of these, the largest come first.
_DESCENDING = frozenset({"when"})


@dataclass(frozen=True)
class Query:
    """What a visitor wants to see of the runs; see :meth:`searching` for what arrives of it.

    Attributes:
        search: Words that all must occur; ``#tag`` is a whole tag.
        state: One of :data:`STATES`.
        sort: One of :data:`SORTS`.
        descending: Whether the largest come first. Runs without a value are always last.
        page: Which page, from 1; the nearest one is shown.
        picked: Ids of the runs that are selected.
    """

    search: str = ""
    state: str = "all"
    sort: str = "when"
    descending: bool = True
    page: int = 1
    picked: frozenset[str] = frozenset()

    def searching(self, search: Any, state: Any) -> Query:
        """Returns the query with what the fields hold; another one begins at its first page."""
        search = search.strip()[:MAX_SEARCH] if isinstance(search, str) else ""
        state = state if isinstance(state, str) and state in STATES else "all"
        page = self.page if (search, state) == (self.search, self.state) else 1
        return replace(self, search=search, state=state, page=page)

    def sorted_by(self, name: str) -> Query:
        """Returns the query by another column, or the other way round by the same one."""
        if name not in SORTS:
            return self
        down = not self.descending if name == self.sort else name in _DESCENDING
        return replace(self, sort=name, descending=down, page=1)

    def picking(self, run: str) -> Query:
        """Returns the query with a run selected, or not any more."""
        if len(self.picked) >= MAX_PICKED and run not in self.picked:
            return self
        return replace(self, picked=self.picked ^ {run})

    def on_page(self, text: str) -> Query:
        """Returns the query of another page."""
        return replace(self, page=int(text) if text.isdecimal() and len(text) < 6 else 1)


@dataclass(frozen=True)
class Listing:
    """One page of the list: its runs, which page it is of how many, and of how many runs."""

    rows: Sequence[tuple[Run, Summary]]
    query: Query
    page: int
    pages: int
    found: int
    all: int


def list_runs(runs: Sequence[Run], summaries: Summaries, query: Query) -> Listing:
    """Returns the page that a query requests, of the runs that do not wait."""
    resting = [run for run in runs if not run.waiting]
    chosen = STATES[query.state]
    stated = [run for run in resting if not chosen or run.status.state in chosen]
    rows = [(run, summaries.of(run)) for run in stated]
    words = query.search.lower().split()
    rows = [row for row in rows if all(_has(row, word) for word in words)]
    rows = _sorted(rows, query)
    pages = max(1, -(-len(rows) // PER_PAGE))
    page = min(max(query.page, 1), pages)
    shown = rows[(page - 1) * PER_PAGE : page * PER_PAGE]
    return Listing(shown, query, page, pages, len(rows), len(resting))


def _has(row: tuple[Run, Summary], word: str) -> bool:
    run, summary = row
    tags = [tag.lower() for tag in run.metadata.tags]
    if word.startswith("#") and len(word) > 1:
        return word[1:] in tags
    texts = (run.name, run.metadata.notes, summary.model, summary.data, summary.method)
    return any(word in text.lower() for text in (*texts, summary.task, *tags))


def _sorted(rows: list[tuple[Run, Summary]], query: Query) -> list[tuple[Run, Summary]]:
    keyed = [(_key(row, query.sort), row) for row in rows]
    known = sorted((one for one in keyed if one[0] is not None), key=lambda one: one[0])
    if query.descending:
        known.reverse()
    return [row for _, row in known] + [row for key, row in keyed if key is None]


def _key(row: tuple[Run, Summary], sort: str) -> Any:
    run, summary = row
    if sort == "best":
        # Values of one metric stand together, the better ones first.
        sign, best = -1 if summary.mode == "max" else 1, summary.best
        # Nothing is in order with a loss that is not a number.
        if best is None or not math.isfinite(best):
            return None
        return summary.metric, sign * best
    words = {"name": run.name, "state": run.status.state}
    words |= {name: getattr(summary, name) for name in ("model", "data", "method")}
    if sort in words:
        return words[sort].lower() or None
    numbers = {"time": summary.seconds, "memory": summary.memory, "when": run.created}
    number = numbers[sort]
    return number if number and math.isfinite(number) else None

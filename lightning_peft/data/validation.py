"""Problems of training rows, and their report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Kind -> (what it is called, what to do).
KINDS: dict[str, tuple[str, str]] = {
    "unreadable": (
        "rows that cannot be read",
        "repair these lines: a row is one JSON object with named fields, or has a field for each "
        "column of its table",
    ),
    "missing": (
        "rows with missing, empty or non-text fields",
        "fill them in, or say which column is which with columns=",
    ),
    "roles": (
        "conversations with wrong roles or a wrong order of turns",
        "an optional system turn comes first, then user and assistant in turn, assistant last",
    ),
    "weight": (
        "rows with weights that training does not have",
        "a turn is trained (weight 1, train true) or not (weight 0, train false); rows that are to "
        "count less or more are taken out of the file or repeated",
    ),
    "tools": (
        "rows whose tools, tool calls or template arguments cannot be read",
        "tools are a list of JSON schemas of functions, the arguments of a call a JSON object",
    ),
    "thoughts": (
        "rows whose thoughts cannot be trained",
        "give a template that writes them with chat_template=, leave them out with "
        'reasoning="strip", or complete an answer that was cut off within them',
    ),
    "key": (
        "rows with keys that change what is learnt, and that nothing reads",
        "correct the key, give a template that writes it with chat_template=, or leave it out on "
        'purpose with ignored_keys=["name"]',
    ),
    "preference": (
        "preference rows without a preference",
        "the two answers must differ, and only in the last turn",
    ),
    "column": (
        "rows with columns that reward functions cannot be given",
        "leave them out with ignored_keys=, or write them as text, numbers, lists or objects",
    ),
    "desirability": (
        "answers that are neither wanted nor unwanted",
        "label is true for an answer that is wanted, and false for one that is not",
    ),
    "label": (
        "rows whose label cannot be used",
        "correct them, or name all labels with labels=; several labels for one row need a "
        "classifier each",
    ),
    "negatives": (
        "rows whose negatives cannot be used",
        "a negative is a text other than the anchor and its positive; a reranker needs at least "
        "one in each row",
    ),
    "score": (
        "rows whose score cannot be used",
        "a score is a number, and for a reranker one from 0 to 1: divide greater ones by the "
        "greatest",
    ),
    "tags": (
        "rows whose tokens and tags do not fit",
        "each token is a word with one tag, and the tokenizer makes tokens of each word",
    ),
    "template": (
        "rows that the chat template cannot render",
        "change the rows, or choose another template with chat_template=",
    ),
    "control": (
        "rows with special tokens inside their text",
        "the model would read them as the end of a turn or text: take them out",
    ),
    "long": (
        "rows longer than max_length",
        'raise max_length=, shorten the rows, or cut their ends off with over_long="truncate" '
        '(plain text: over_long="split")',
    ),
    "untrained": (
        "rows in which nothing of the answer is trained",
        "raise max_length=, or give a template that writes the answers with chat_template=",
    ),
    "all_trained": (
        "rows whose prompt would be trained as well",
        "the template marks too much as generated: give another with chat_template=",
    ),
    "no_end": (
        "rows whose end-of-sequence token is not trained",
        "the model would not learn to stop: give another template with chat_template=",
    ),
    "image": (
        "rows whose image cannot be used",
        "repair or replace these files; a path is seen from the file that names it",
    ),
    "two_labels": (
        "images that come with two labels",
        "keep the right one: the other would teach the opposite",
    ),
    "value": (
        "steps without a number",
        "fill them in: a window cannot leave out a step",
    ),
    "time": (
        "steps out of order, repeated, or missing",
        "sort the rows by time, with one for each step",
    ),
    "duplicate": (
        "exact duplicates of other rows",
        'remove them, or train on them as often as they come with duplicates="keep"',
    ),
    "leak": (
        "rows that are in two splits",
        "remove them from one: a model is not measured by what it was trained on",
    ),
    "split": (
        "rows with an unknown or missing split",
        "name the split of every row (train, validation or test) in that column, or leave it out "
        'with ignored_keys=["split"]',
    ),
    "unknown": (
        "rows whose target the tokenizer cannot write",
        "the model would learn the unknown token in its place: choose a model that knows these "
        'characters, take them out, or train on them as they are with unknown="keep"',
    ),
    "audio": (
        "rows whose recording cannot be used",
        "repair or replace the files; paths are relative to the file that names them",
    ),
    "audio_long": (
        "rows whose recording is longer than the model hears at once",
        "cut recording and transcript into shorter ones",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One problem of one row, by its file or hub split; ``detail`` continues "row 3 ..."."""

    kind: str
    file: str
    row: int
    detail: str


class EncodingProblem(Exception):
    """A row that cannot be encoded, with the kind of problem, a key of :data:`KINDS`."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def describe(problems: Sequence[Problem], rows: int, limit: int = 12) -> str:
    """Returns the problems by kind: how many, which rows (``limit`` in full), and the fix."""
    bad = len({(problem.file, problem.row) for problem in problems})
    several = _several_files(problems)
    lines = [f"{bad:,} of {rows:,} rows cannot be used:"]
    for kind, found in by_kind(problems).items():
        title, remedy = KINDS[kind]
        lines.append(f"  {title}: {len({(p.file, p.row) for p in found}):,}")
        for problem in found[:limit]:
            of_file = f"{problem.file} " if several else ""
            lines.append(f"    - {of_file}row {problem.row} {problem.detail}")
        if len(found) > limit:
            lines.append(f"    - ... and rows {row_numbers(found[limit:], several)}")
        lines.append(f"    What to do: {remedy}.")
    return "\n".join(lines)


def by_kind(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Returns the problems of each kind that occurs, in the order of :data:`KINDS`."""
    found = {kind: [one for one in problems if one.kind == kind] for kind in KINDS}
    return {kind: ones for kind, ones in found.items() if ones}


def _several_files(problems: Sequence[Problem]) -> bool:
    files = {problem.file for problem in problems}
    # In a folder, a number alone is ambiguous.
    return len(files) > 1 or any("/" in file for file in files)


def row_numbers(problems: Sequence[Problem], several: bool | None = None) -> str:
    """Returns the rows with problems in short form, of each file where there may be several."""
    several = _several_files(problems) if several is None else several
    files = list(dict.fromkeys(problem.file for problem in problems))
    parts = []
    for file in files:
        numbers = ranges(problem.row for problem in problems if problem.file == file)
        parts.append(f"{numbers} of {file}" if several else numbers)
    return "; ".join(parts)


def ranges(numbers: Iterable[int]) -> str:
    """Returns row numbers in short form: ``"1-3, 7"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        add_to_runs(runs, number)
    return format_runs(runs)


def add_to_runs(runs: list[list[int]], number: int) -> None:
    """Adds a number to runs of first and last numbers, in which no greater one is."""
    if runs and number == runs[-1][1] + 1:
        runs[-1][1] = number
    elif not runs or number > runs[-1][1]:
        runs.append([number, number])


def format_runs(runs: Iterable[Sequence[int]]) -> str:
    """Returns runs of first and last numbers in short form: ``"1-3, 7"``."""
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)

"""Data preparation in one pass: validate, tokenize and split all rows."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from datasets import Features, Value

from lightning_peft.compat.datasets import tqdm
from lightning_peft.data.file_format import Row
from lightning_peft.data.parallel_encoding import (
    MAX_WORKERS,
    Outcome,
    WorkersFailed,
    encode_rows,
)
from lightning_peft.data.prepared_parts import (
    PART_ROWS,
    PartStore,
    PartWriter,
    Prepared,
    join,
    open_prepared,
    outcome_in,
)
from lightning_peft.data.progress import counted_rows
from lightning_peft.data.prompts import PromptCollector
from lightning_peft.data.reading import (
    SPLITS,
    Source,
    SourceChanged,
    check_unchanged,
    describe_formats,
    file_stamps,
    log_formats,
    split_named,
)
from lightning_peft.data.row_content import ContentCounter, FirstRows, FirstSeen
from lightning_peft.data.row_encoder import RowEncoder
from lightning_peft.data.row_keys import KeyCount, check_ignored
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import Layout, detect_layout
from lightning_peft.engine import cache_entries
from lightning_peft.errors import ConfigError
from lightning_peft.processes import usable_cores

log = logging.getLogger(__name__)

# Raised whenever the same input is prepared in another way.
FORMAT = 10
# Rows that are looked at to recognise their shape.
SCHEMA_SAMPLE_ROWS = 100
DEFAULT_SPLIT_FRACTIONS = {"validation": 0.05}
# The origin of every row, next to the columns of its encoder.
_ORIGIN = {"file": Value("string"), "row": Value("int64")}


@dataclass(frozen=True)
class PreparationSettings:
    """Everything but the rows that decides how data is prepared: part of the key of the cache.

    ``shares`` are fractions of the rows for each split but ``train``, ``None`` for the default;
    ``encoding`` is everything that decides how rows are encoded, as JSON holds it.
    """

    accepts: tuple[str, ...]
    shape: str
    columns: dict[str, str] | None
    duplicates: Literal["error", "keep"]
    shares: dict[str, float] | None
    split_seed: int
    encoding: dict[str, Any]
    ignored_keys: tuple[str, ...] = ()


EncoderFor = Callable[[Layout], RowEncoder]


def draw_split(digest: bytes, seed: int, shares: dict[str, float]) -> str:
    """Returns the split of a row, which depends only on the digest of its content and the seed.

    ``shares`` are the fractions of each split but ``train``, which takes the rest.
    """
    number = int.from_bytes(hashlib.sha256(f"{seed}:".encode() + digest).digest()[:8], "big")
    place, edge = number / 2**64, 0.0
    for split, share in shares.items():
        edge += share
        if place < edge:
            return split
    return "train"


def prepare(
    sources: Sequence[Source],
    settings: PreparationSettings,
    encoder_for: EncoderFor,
    folder: Path | None,
) -> Prepared:
    """Returns the prepared data, from the cache if it was prepared before.

    Rows with problems are left out and listed; the caller refuses them. ``encoder_for`` is called
    once the layout of the rows is known.
    """
    before = file_stamps(sources)
    key = cache_entries.key_of(
        format=FORMAT,
        sources=[{**asdict(source), "data": source.digest()} for source in sources],
        settings=asdict(settings),
    )

    def unchanged() -> None:
        check_unchanged(before, file_stamps(sources))

    def build(working: Path, processes: int) -> dict[str, Any]:
        run = _PreparationPass(sources, settings, encoder_for, working, processes, store, unchanged)
        summary = run.run()
        unchanged()
        return summary

    folder = folder or cache_entries.cache_root() / "data"

    def entry(processes: int) -> Path:
        using = partial(build, processes=processes)
        return cache_entries.entry(folder, key, using, "prepared data", "cache_dir")

    with closing(PartStore(folder / f".{key}-parts")) as store:
        try:
            final = _entry_by_workers(entry)
        except SourceChanged:
            # Of other errors, such as those of a network, the parts outlive the next attempt.
            store.discard()
            raise
        store.discard()
    for source in sources:
        if source.left_out():
            names = ", ".join(source.left_out())
            log.warning(f"Not read as data in {source.data!r}: {names}")
    prepared = open_prepared(final)
    log_formats(prepared.summary["read_as"])
    if prepared.summary["split_by"]["by"] == "files" and "validation" not in prepared.splits:
        log.warning(f"No row is held out for validation.{sources[0].split_files()}")
    return prepared


def _entry_by_workers(entry: Callable[[int], Path]) -> Path:
    """Returns an entry that several processes make, or one where they fail."""
    try:
        return entry(min(usable_cores(), MAX_WORKERS))
    except (WorkersFailed, RuntimeError) as error:
        # The other is what torch raises wherever this process is when a worker dies.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        log.warning(f"The rows are prepared again, in one process ({reason}).")
    return entry(1)


@dataclass(frozen=True)
class _ParsedRow:
    """A row that was read, with the kind and text of its problems so far."""

    row: Row
    sample: Sample | None
    split: str
    problems: list[tuple[str, str]]
    # Whether it is an exact duplicate that is kept.
    again: bool = False


class _PreparationPass:
    """One pass over all rows, which writes the good ones and the rejected ones to a folder."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: PreparationSettings,
        encoder_for: EncoderFor,
        working: Path,
        processes: int,
        store: PartStore,
        check_sources: Callable[[], None],
    ) -> None:
        self.processes, self.store, self.check_sources = processes, store, check_sources
        self.sources, self.settings = sources, settings
        self.encoder_for, self.working = encoder_for, working
        self.first_rows = FirstRows(keep_duplicates=settings.duplicates == "keep")
        # The split that a prompt was first in.
        self.prompts = FirstSeen("B")
        self.prompt_collector = PromptCollector()
        self.content = ContentCounter()
        self.counts: Counter[str] = Counter()
        self.unused = KeyCount()
        self.names: set[str] = set()
        self.splits: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}

    def run(self) -> dict[str, Any]:
        """Writes the files and returns the summary."""
        rows: Iterator[Row] = chain.from_iterable(source.rows() for source in self.sources)
        first = list(islice(self.sources[0].rows(), SCHEMA_SAMPLE_ROWS))
        values = [row.value for row in first if row.value is not None]
        if not first:
            raise ConfigError(
                f"There are no rows in {self.sources[0].data!r}. Name a file that has some."
            )
        if not values:
            raise ConfigError(
                f"None of the first {len(first)} rows of {first[0].file!r} can be read: row "
                f"{first[0].number} {first[0].problem}. A row is one JSON object, or a line of a "
                "table below the names of its columns."
            )
        settings = self.settings
        self.layout = detect_layout(values, settings.columns, settings.shape, settings.accepts)
        self.split_column = self._split_column()
        column = self.split_column
        self.by_column = any(split_named(value.get(column)) for value in values if column)
        splits = [*self.sources[0].splits_by_name(), *(row.split for row in first)]
        self.has_splits = self.by_column or any(split is not None for split in splits)
        self._check_settings()
        self.encoder = self.encoder_for(self.layout)
        self.layout = replace(
            self.layout,
            split_column=column if self.by_column else None,
            variables=self.encoder.variables,
            ignored=frozenset(settings.ignored_keys),
        )
        features = Features({**self.encoder.features, **_ORIGIN})
        # A terminal shows a progress bar if it takes seconds.
        name = Path(str(self.sources[0].data)).name
        bar = {"desc": f"Preparing {name}", "unit": " rows", "delay": 2, "disable": None}
        self._write_parts(map(self._parse, tqdm(counted_rows(rows), **bar)), features)
        check_ignored(settings.ignored_keys, self.layout.seen_keys)
        self.prompt_collector.write(self.working)
        self.content.write(self.working)
        return self._summary()

    def _split_column(self) -> str | None:
        """Returns the column that says the split of a row, which the first rows may not have."""
        mapped = (self.settings.columns or {}).values()
        column = self.layout.split_column or ("split" if "split" not in mapped else None)
        return None if column in self.settings.ignored_keys else column

    def _check_settings(self) -> None:
        shape, settings = self.layout.shape, self.settings
        if shape.name not in settings.accepts:
            raise ConfigError(
                f"The rows are {shape.title}, and what is trained here is "
                f"{', '.join(settings.accepts)}. {shape.title[:1].upper()}{shape.title[1:]} are "
                f"for {shape.data_class}. If they only look like it, say which column is which, "
                'such as columns={"prompt": "text", "completion": "label"}.'
            )
        if self.has_splits and settings.shares is not None:
            raise ConfigError(
                f"validation_share and test_share are given ({settings.shares}), and the data says "
                "itself which rows are for what (by file, by a column split, or on the hub). Leave "
                "the shares out, or name one file of rows to share out."
                + self.sources[0].split_files()
            )

    def _parse(self, row: Row) -> _ParsedRow:
        """Parses a row, and finds the problems known before it is encoded."""
        self.counts["rows"] += 1
        if row.value is None:
            return _ParsedRow(row, None, "", [("unreadable", row.problem or "")])
        self.names.update(row.value)
        sample = self.layout.parse(row.value)
        split, problems = self._split(row)
        if not isinstance(sample, Sample):
            return _ParsedRow(row, None, "", [*problems, *sample])
        digest = sample.digest()
        split = split or draw_split(digest, self.settings.split_seed, self._split_fractions())
        found, again = self.first_rows.problems(row.file, row.number, digest, split)
        self.splits[split]["duplicates"] += again
        problems += found
        return _ParsedRow(row, sample, split, problems, again)

    def _write_parts(self, parsed: Iterator[_ParsedRow], features: Features) -> None:
        """Writes all rows, those that an interrupted pass has not written to new parts."""
        size, resumable = self.encoder.writer_batch_size, self.encoder.resumable
        parts: list[Path] = []
        for part, summary in self.store.found() if resumable else []:
            self._resume(summary, parsed)
            parts.append(part)
        if parts:
            log.info(
                f"{self.counts['rows']:,} rows were prepared before an interruption; the "
                "preparation continues behind them."
            )
        most = PART_ROWS if resumable else None
        encoded = encode_rows(self.encoder, parsed, lambda one: one.sample, self.processes)
        with closing(encoded):
            while True:
                number = len(parts)
                writer = PartWriter(self.working / f"part-{number}", features, size)
                with closing(writer):
                    for parsed_row, outcome in islice(encoded, most):
                        self._write(parsed_row, outcome, writer)
                    summary = writer.finish()
                parts.append(writer.folder)
                if writer.rows != most:
                    break
                # Rows of two versions of a file would be those of neither.
                self.check_sources()
                parts[-1] = self.store.keep(writer.folder, number, summary)
        join(parts, self.working, features, size)

    def _resume(self, summary: dict[str, Any], parsed: Iterator[_ParsedRow]) -> None:
        """Counts the rows of a part that is finished, without encoding them."""
        for number, parsed_row in enumerate(islice(parsed, summary["rows"])):
            self._note(parsed_row, outcome_in(summary, number))
        for split, counts in summary["counts"].items():
            self.splits[split].update(counts)

    def _write(self, parsed_row: _ParsedRow, outcome: Outcome, part: PartWriter) -> None:
        """Writes a row, or why it cannot be used."""
        row, split = parsed_row.row, parsed_row.split
        problems = self._note(parsed_row, outcome)
        part.add(outcome)
        if problems:
            part.reject(row, problems)
            return
        for one in outcome.rows:
            counts = {"rows": 1, **self.encoder.count(one)}
            part.counts[split].update(counts)
            self.splits[split].update(counts)
            part.write(split, {**one, "file": row.file, "row": row.number})

    def _note(self, parsed_row: _ParsedRow, outcome: Outcome) -> list[tuple[str, str]]:
        """Counts a row, but for what it is encoded to, and returns its problems."""
        row, sample, split = parsed_row.row, parsed_row.sample, parsed_row.split
        problems = [*parsed_row.problems, *outcome.problems]
        if sample is not None:
            keys = [*sample.unused, *map(self.layout.with_column_name, outcome.unused)]
            self.unused.add(dict.fromkeys(keys), row.file, row.number)
        if problems:
            self.counts["rejected"] += 1
            return problems
        assert sample is not None
        system = getattr(self.encoder, "system_prompt", None)
        self.prompt_collector.add(sample.with_system(system), split)
        self.content.add(sample, row.file, row.number, parsed_row.again)
        prompt, place = sample.prompt_digest(), SPLITS.index(split)
        if prompt is not None and self.prompts.setdefault(prompt, place) != (place,):
            self.counts["shared_prompts"] += 1
        return problems

    def _split_fractions(self) -> dict[str, float]:
        if self.has_splits:
            return {}
        shares = self.settings.shares
        return DEFAULT_SPLIT_FRACTIONS if shares is None else shares

    def _split(self, row: Row) -> tuple[str | None, list[tuple[str, str]]]:
        assert row.value is not None
        column = self.split_column
        name = row.value.get(column) if column else None
        what = f"has {name!r} as {column}"
        if row.split is None and self.by_column:
            found = split_named(name)
            return found, [] if found else [("split", what)]
        if row.split is None and split_named(name):
            # It would be drawn, and a row to test on could be trained on.
            return None, [("split", f"{what}, and the first {SCHEMA_SAMPLE_ROWS} rows have none")]
        return row.split or ("train" if self.has_splits else None), []

    def _summary(self) -> dict[str, Any]:
        names = ("rows", "duplicates", *self.encoder.counts)
        split = self.layout.split_column
        return {
            "rows": self.counts["rows"],
            "rejected": self.counts["rejected"],
            "shape": self.layout.shape.name,
            "columns": self.layout.columns,
            "columns_unused": sorted(self.names - {*self.layout.columns.values(), split}),
            "keys_unused": self.unused.summary(),
            "read_as": [one for source in self.sources for one in describe_formats(source)],
            "files_left_out": [name for source in self.sources for name in source.left_out()],
            "split_by": self._split_by(),
            "shared_prompts": self.counts["shared_prompts"],
            "splits": {s: {name: c[name] for name in names} for s, c in self.splits.items()},
            "settings": asdict(self.settings),
            **self.encoder.summary(),
        }

    def _split_by(self) -> dict[str, Any]:
        if self.has_splits:
            return {"by": "column split" if self.by_column else "files"}
        return {
            "by": "content",
            "seed": self.settings.split_seed,
            "shares": self._split_fractions(),
        }

"""From rows to tokens: one pass that checks every row, and shares them out to splits."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter

from lightning_peft.data import cache
from lightning_peft.data.encoding import (
    IGNORED,
    Encoded,
    Encoder,
    EncodingProblem,
    LossOn,
    OverLong,
)
from lightning_peft.data.reading import SPLITS, Row, Source, split_named
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import recognise
from lightning_peft.data.templates import find_template
from lightning_peft.data.validation import Problem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

REJECTED = "rejected.jsonl"
# Rows that are looked at to recognise their shape.
FIRST = 100
COUNTS = (
    "rows",
    "tokens",
    "trained_tokens",
    "ends_trained",
    "ends_added",
    "truncated",
    "tokens_cut",
    "duplicates",
)
DEFAULT_SHARES = {"validation": 0.05}
TRAINABLE = ("messages", "alpaca", "prompt_completion", "text")
_FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "labels": ListOf(Value("int32")),
        "length": Value("int32"),
        "file": Value("string"),
        "row": Value("int64"),
    }
)


@dataclass(frozen=True)
class Settings:
    """What decides, with the rows and the tokenizer, what the prepared data is.

    The fields are arguments of :class:`lightning_peft.data.supervised.SupervisedData`, which
    documents them.
    """

    shape: str
    columns: dict[str, str] | None
    chat_template: str | None
    system_prompt: str | None
    loss_on: LossOn
    max_length: int
    over_long: OverLong
    duplicates: Literal["error", "keep"]
    shares: dict[str, float] | None
    split_seed: int


@dataclass(frozen=True)
class Prepared:
    """Data that is ready to be trained on.

    Attributes:
        splits: ``input_ids``, ``labels`` (int32), ``length``, ``file`` and ``row`` of each row of
            ``train``, ``validation`` and ``test``, mapped from disk; only splits with rows.
        problems: What is wrong with the rows that are not in it.
        summary: Counts, shape, template, split and settings, as they are kept beside the data.
        folder: Where it is on disk.
    """

    splits: dict[str, Dataset]
    problems: list[Problem]
    summary: dict[str, Any]
    folder: Path

    def lengths(self, split: str) -> list[int]:
        """Returns the number of tokens of every row."""
        if split not in self.splits:
            return []
        found: list[int] = self.splits[split].data.column("length").to_pylist()
        return found


def split_of(digest: bytes, seed: int, shares: dict[str, float]) -> str:
    """Returns the split of a row, which depends on its content and the seed and nothing else.

    Args:
        digest: Of the row's content.
        seed: Another one shares the rows out in another way.
        shares: Share of each split but ``train``, which takes the rest.
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
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    folder: Path | None,
) -> Prepared:
    """Returns the prepared data, from the cache where it was prepared before.

    Rows with problems are left out and told; it is for the caller to refuse them.

    Args:
        sources: Where the rows come from.
        tokenizer: The tokenizer.
        settings: What is to be made of them.
        folder: The cache; ``None`` for the user's.

    Raises:
        ConfigError: If the data cannot be read at all, or settings do not fit it.
    """
    key = cache.key_of(
        sources=[{**asdict(source), "data": _content(source)} for source in sources],
        tokenizer=cache.digest_of_tokenizer(tokenizer),
        template=getattr(tokenizer, "chat_template", None),
        settings=asdict(settings),
    )
    final = cache.entry(
        folder or cache.default_folder(),
        key,
        lambda working: _Pass(sources, tokenizer, settings, working).run(),
    )
    for source in sources:
        if source.left_out():
            names = ", ".join(source.left_out())
            log.warning(f"Not read as data in {source.data!r}: {names}")
    summary = json.loads((final / cache.SUMMARY).read_text(encoding="utf-8"))
    splits = {
        split: Dataset.from_file(str(final / f"{split}.arrow"))
        for split in SPLITS
        if summary["splits"][split]["rows"]
    }
    return Prepared(splits, _read_problems(final / REJECTED), summary, final)


def _content(source: Source) -> str:
    files = source.files()
    if files:
        root = Path(source.data)
        names = [(p.relative_to(root).as_posix() if root.is_dir() else p.name) for p in files]
        return cache.digest_of_files(zip(names, files, strict=True))
    return cache.digest_of_rows(asdict(row) for row in source.rows())


def _read_problems(file: Path) -> list[Problem]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Problem(reason["kind"], row["file"], row["row"], reason["detail"])
        for row in rows
        for reason in row["reasons"]
    ]


class _Pass:
    """One pass over all rows, which writes the good ones and the rejected ones to a folder."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        working: Path,
    ) -> None:
        self.sources, self.tokenizer, self.settings = sources, tokenizer, settings
        self.working = working
        self.seen: dict[bytes, tuple[str, str, int]] = {}
        self.prompts: dict[bytes, str] = {}
        self.counts: Counter[str] = Counter()
        self.splits: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}

    def run(self) -> dict[str, Any]:
        """Writes the files and returns the summary.

        Raises:
            ConfigError: If there are no rows, or settings do not fit them.
        """
        rows: Iterator[Row] = chain.from_iterable(source.rows() for source in self.sources)
        first = list(islice(self.sources[0].rows(), FIRST))
        values = [row.value for row in first if row.value is not None]
        if not first:
            raise ConfigError(
                f"There are no rows in {self.sources[0].data!r}. Name a file that has some."
            )
        if not values:
            raise ConfigError(
                f"None of the first {len(first)} rows of {first[0].file!r} can be read: row "
                f"{first[0].number} {first[0].problem}. Each line must be one JSON object."
            )
        self.layout = recognise(values, self.settings.columns, self.settings.shape)
        column = self.layout.split_column
        self.by_column = any(split_named(value.get(column)) for value in values if column)
        self.given = self.by_column or any(row.split is not None for row in first)
        self._check_settings()
        self.encoder = self._encoder()
        writers = {
            split: ArrowWriter(features=_FEATURES, path=str(self.working / f"{split}.arrow"))
            for split in SPLITS
        }
        with (self.working / REJECTED).open("w", encoding="utf-8") as rejected:
            for row in rows:
                self.counts["rows"] += 1
                reasons = self._take(row, writers)
                if reasons:
                    self.counts["rejected"] += 1
                    rejected.write(json.dumps(_rejection(row, reasons), default=repr) + "\n")
        for split, writer in writers.items():
            if self.splits[split]["rows"]:
                writer.finalize()
            else:
                writer.close()
                (self.working / f"{split}.arrow").unlink(missing_ok=True)
        return self._summary()

    def _check_settings(self) -> None:
        layout, settings = self.layout, self.settings
        if layout.shape.name not in TRAINABLE:
            raise ConfigError(
                f"The rows are {layout.shape.title}, and supervised fine-tuning of a causal "
                f"language model takes {', '.join(TRAINABLE)}. To learn the answers, say which "
                'column is which, such as columns={"prompt": "text", "completion": "label"}.'
            )
        if self.given and settings.shares is not None:
            raise ConfigError(
                f"validation_share and test_share are given ({settings.shares}), and the data says "
                "itself which rows are for what (by file, by a column split, or on the hub). Leave "
                "the shares out, or name one file of rows to share out."
            )
        if settings.over_long == "split" and layout.shape.name != "text":
            raise ConfigError(
                f'over_long="split" is for plain text, and the rows are {layout.shape.title}: the '
                'second half would have no prompt. Use "truncate", or raise max_length.'
            )
        if layout.shape.name == "text" and settings.system_prompt is not None:
            raise ConfigError(
                f"system_prompt={settings.system_prompt!r} is given, and plain text has no turns. "
                "Leave it out."
            )

    def _encoder(self) -> Encoder:
        settings = self.settings
        plain = self.layout.shape.name == "text"
        template = None if plain else find_template(self.tokenizer, settings.chat_template)
        return Encoder(
            self.tokenizer, template, settings.max_length, settings.loss_on, settings.over_long
        )

    def _take(self, row: Row, writers: dict[str, ArrowWriter]) -> list[tuple[str, str]]:
        """Writes a row, or returns why it cannot be used."""
        if row.value is None:
            return [("unreadable", row.problem or "")]
        sample = self.layout.parse(row.value)
        split, problems = self._split(row)
        if not isinstance(sample, Sample):
            return [*problems, *sample]
        digest = sample.digest()
        split = split or split_of(digest, self.settings.split_seed, self._shares())
        problems += self._repetition(row, digest, split)
        try:
            encoded = self.encoder.encode(self._with_system(sample))
        except EncodingProblem as problem:
            return [*problems, (problem.kind, str(problem))]
        if not problems:
            self._count(sample, split, encoded)
            for one in encoded:
                content = {"input_ids": one.input_ids, "labels": one.labels}
                origin = {"file": row.file, "row": row.number}
                writers[split].write({**content, "length": len(one.input_ids), **origin})
        return problems

    def _shares(self) -> dict[str, float]:
        if self.given:
            return {}
        shares = self.settings.shares
        return DEFAULT_SHARES if shares is None else shares

    def _split(self, row: Row) -> tuple[str | None, list[tuple[str, str]]]:
        if row.split is not None or not self.by_column:
            return row.split or ("train" if self.given else None), []
        assert row.value is not None
        name = row.value.get(self.layout.split_column or "")
        found = split_named(name)
        return found, [] if found else [("split", f"has {name!r} as split")]

    def _repetition(self, row: Row, digest: bytes, split: str) -> list[tuple[str, str]]:
        before = self.seen.setdefault(digest, (split, row.file, row.number))
        if before == (split, row.file, row.number):
            return []
        file = f" of {before[1]}" if before[1] != row.file else ""
        if before[0] != split:
            text = f"is for {split} and the same as row {before[2]}{file}, which is for {before[0]}"
            return [("leak", text)]
        if self.settings.duplicates == "keep":
            self.splits[split]["duplicates"] += 1
            return []
        return [("duplicate", f"is the same as row {before[2]}{file}")]

    def _with_system(self, sample: Sample) -> Sample:
        prompt = self.settings.system_prompt
        if prompt is None or not sample.messages or sample.messages[0]["role"] == "system":
            return sample
        return Sample([{"role": "system", "content": prompt}, *sample.messages])

    def _count(self, sample: Sample, split: str, encoded: Sequence[Encoded]) -> None:
        counts = self.splits[split]
        prompt = sample.prompt_digest()
        if prompt is not None and self.prompts.setdefault(prompt, split) != split:
            self.counts["shared_prompts"] += 1
        for one in encoded:
            counts["rows"] += 1
            counts["tokens"] += len(one.input_ids)
            counts["trained_tokens"] += sum(label != IGNORED for label in one.labels)
            counts["ends_trained"] += self.encoder.end in one.labels
            counts["ends_added"] += one.end_added
            counts["truncated"] += one.cut > 0
            counts["tokens_cut"] += one.cut

    def _summary(self) -> dict[str, Any]:
        template = self.encoder.template
        return {
            "rows": self.counts["rows"],
            "rejected": self.counts["rejected"],
            "shape": self.layout.shape.name,
            "columns": self.layout.columns,
            "columns_unused": self._unused(),
            "files_left_out": [name for source in self.sources for name in source.left_out()],
            "template": template and {"name": template.name, "text": template.text},
            "split_by": self._split_by(),
            "shared_prompts": self.counts["shared_prompts"],
            "splits": {s: {name: c[name] for name in COUNTS} for s, c in self.splits.items()},
            "settings": asdict(self.settings),
        }

    def _unused(self) -> list[str]:
        return [
            c for c in self.layout.unused if not (self.by_column and c == self.layout.split_column)
        ]

    def _split_by(self) -> dict[str, Any]:
        if self.given:
            return {"by": "column split" if self.by_column else "files"}
        return {
            "by": "content",
            "seed": self.settings.split_seed,
            "shares": self._shares(),
        }


def _rejection(row: Row, reasons: list[tuple[str, str]]) -> dict[str, Any]:
    told = [{"kind": kind, "detail": detail} for kind, detail in reasons]
    return {"file": row.file, "row": row.number, "reasons": told, "value": row.value}

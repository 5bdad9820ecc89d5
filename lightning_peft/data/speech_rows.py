"""What becomes of a row with a recording and its transcript, and where the recording is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from lightning_peft.data.audio import Recording, can_resample, decode
from lightning_peft.data.reading import Row, Source
from lightning_peft.data.row_encoder import RowEncoder, SpecialTokens, end_token_id
from lightning_peft.data.samples import Sample
from lightning_peft.data.shapes import FIELDS
from lightning_peft.data.validation import EncodingProblem

_SOUND = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac"}


@dataclass(frozen=True)
class AudioSource(Source):
    """Rows whose paths of recordings, which are relative to their file, are made absolute."""

    column: str | None = None

    def rows(self) -> Iterator[Row]:
        """Yields every row."""
        root = Path(self.data)
        names = FIELDS["audio"] if self.column is None else (self.column,)
        for row in super().rows():
            folder = (root / row.file).parent if root.is_dir() else root.parent
            value = row.value or {}
            found = {n: value[n] for n in names if isinstance(value.get(n), str)}
            paths = {n: str((folder / path).absolute()) for n, path in found.items() if path}
            yield replace(row, value={**value, **paths}) if paths and self.files() else row

    def left_out(self) -> list[str]:
        """Returns the files in the folder that are neither rows nor recordings."""
        return [name for name in super().left_out() if Path(name).suffix.lower() not in _SOUND]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Returns path, size and time of each recording that a row names."""
        names = FIELDS["audio"] if self.column is None else (self.column,)
        rows = self.rows() if self.files() else iter(())
        values = [value for row in rows for n in names if (value := (row.value or {}).get(n))]
        paths = {value for value in values if isinstance(value, str)}
        stats = {path: Path(path).stat() for path in sorted(paths) if Path(path).is_file()}
        return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]


class SpeechRows(RowEncoder):
    """Tokens of a transcript, and its recording, whose sound is read again for each batch."""

    features = Features(
        {
            "path": Value("string"),
            "content": Value("binary"),
            "labels": ListOf(Value("int32")),
            "target": Value("string"),
            "seconds": Value("float64"),
            "length": Value("int32"),
            "end_added": Value("bool"),
        }
    )
    counts = ("seconds", "trained_tokens", "ends_trained", "ends_added", "unknown_tokens")

    def __init__(self, tokenizer: Any, max_length: int, rate: int, max_seconds: float) -> None:
        self.tokenizer, self.end = tokenizer, end_token_id(tokenizer)
        self.max_length, self.rate, self.max_seconds = max_length, rate, max_seconds
        self._special_tokens = SpecialTokens(tokenizer)

    def encode(self, sample: Sample) -> list[dict[str, Any]]:
        """Returns the row that ``sample`` becomes."""
        assert sample.audio is not None
        assert sample.text is not None
        seconds = self._seconds(sample.audio)
        labels, added = self._labels(sample.text)
        return [
            {
                "path": sample.audio.path,
                "content": sample.audio.content,
                "labels": labels,
                "target": sample.text,
                "seconds": seconds,
                # In hundredths of a second, which are the frames of Whisper.
                "length": max(1, round(100 * seconds)),
                "end_added": added,
            }
        ]

    def count(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns seconds, trained tokens, ends and unknown tokens."""
        unknown = self.tokenizer.unk_token_id
        return {
            **super().count(row),
            "seconds": row["seconds"],
            "trained_tokens": len(row["labels"]),
            "ends_trained": int(self.end in row["labels"]),
            # Whisper's is its end token.
            "unknown_tokens": row["labels"].count(unknown) if unknown != self.end else 0,
        }

    def _seconds(self, audio: Recording) -> float:
        sound, rate = decode(audio.found)
        seconds = len(sound) / rate
        if seconds > self.max_seconds:
            raise EncodingProblem(
                "audio_long", f"has {seconds:.1f} seconds of audio of {self.max_seconds:g} allowed"
            )
        if rate != self.rate and not can_resample():
            raise EncodingProblem(
                "audio",
                f"has audio at {rate:,} Hz for a model that hears {self.rate:,} Hz, and resampling "
                "takes `scipy` (pip install scipy)",
            )
        return seconds

    def _labels(self, text: str) -> tuple[list[int], bool]:
        self._special_tokens.check(text, "transcript")
        ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        # The model puts its start token before the labels itself.
        start = list(getattr(self.tokenizer, "prefix_tokens", [])[:1])
        ids = ids[1:] if start and ids[:1] == start else ids
        added = ids[-1:] != [self.end]
        ids = [*ids, self.end] if added else ids
        if len(ids) > self.max_length:
            raise EncodingProblem(
                "long", f"has {len(ids):,} tokens as transcript of {self.max_length:,} allowed"
            )
        return ids, added

"""Writes ``telephone_keys.parquet`` next to this file: recordings of keys, with their names."""

from __future__ import annotations

import io
import random
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

ROWS = 400
# The keypad of a telephone: each key sounds the frequency of its row and of its column, in hertz.
KEYS = {
    "one": (697, 1209), "two": (697, 1336), "three": (697, 1477),
    "four": (770, 1209), "five": (770, 1336), "six": (770, 1477),
    "seven": (852, 1209), "eight": (852, 1336), "nine": (852, 1477),
    "zero": (941, 1336),
}  # fmt: skip
RATE = 16_000


def key(word: str, milliseconds: int, volume: int) -> bytes:
    """Returns the sound of a key in 8 bits."""
    times = np.arange(RATE * milliseconds // 1000) / RATE
    tones = sum(np.sin(2 * np.pi * frequency * times) for frequency in KEYS[word])
    return (128 + np.round(volume / 2 * tones)).astype(np.uint8).tobytes()


def rows() -> Iterator[dict[str, Any]]:
    """Yields recordings of two to four keys that are pressed, as WAV, with their names."""
    draw = random.Random(3)
    seen = set()
    while len(seen) < ROWS:
        words = [draw.choice(list(KEYS)) for _ in range(draw.randint(2, 4))]
        volume = draw.choice((40, 80))
        silence = [bytes([128]) * (RATE * draw.choice((30, 45, 60)) // 1000) for _ in words]
        sounds = [key(word, draw.choice((50, 70, 90)), volume) for word in words]
        with wave.open(file := io.BytesIO(), "wb") as sound:
            sound.setparams((1, 1, RATE, 0, "NONE", ""))
            sound.writeframes(b"".join(map(b"".join, zip(sounds, silence, strict=True))))
        if file.getvalue() not in seen:
            seen.add(file.getvalue())
            audio = {"bytes": file.getvalue(), "path": f"call-{len(seen)}.wav"}
            yield {"audio": audio, "text": " ".join(words)}


def main(folder: Path) -> None:
    """Writes the same rows each time."""
    table = pa.Table.from_pylist(list(rows()))
    parquet.write_table(table, folder / "telephone_keys.parquet", compression="zstd")


if __name__ == "__main__":
    main(Path(__file__).parent)

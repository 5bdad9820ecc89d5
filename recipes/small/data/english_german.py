"""Writes ``english_german.jsonl`` next to this file: English sentences with the German ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

ROWS = 300
EVENTS = {
    "The train leaves": "Der Zug fährt",
    "The shop opens": "Der Laden öffnet",
    "The film begins": "Der Film beginnt",
    "My sister arrives": "Meine Schwester kommt",
    "The children sing": "Die Kinder singen",
    "Our lesson ends": "Unser Unterricht endet",
}
DAYS = {
    "Monday": "Montag",
    "Tuesday": "Dienstag",
    "Wednesday": "Mittwoch",
    "Thursday": "Donnerstag",
    "Friday": "Freitag",
    "Saturday": "Samstag",
    "Sunday": "Sonntag",
}
HOURS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs",
    "seven": "sieben", "eight": "acht", "nine": "neun", "ten": "zehn", "eleven": "elf",
    "twelve": "zwölf",
}  # fmt: skip


def rows() -> Iterator[dict[str, dict[str, str]]]:
    """Yields English sentences with the German ones."""
    draw = random.Random(2)
    every = [(event, day, hour) for event in EVENTS for day in DAYS for hour in HOURS]
    for event, day, hour in draw.sample(every, ROWS):
        english = f"{event} on {day} at {hour}."
        german = f"{EVENTS[event]} am {DAYS[day]} um {HOURS[hour]}."
        yield {"translation": {"en": english, "de": german}}


def main(folder: Path) -> None:
    """Writes the same file each time."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
    (folder / "english_german.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)

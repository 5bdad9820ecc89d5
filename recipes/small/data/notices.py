"""Writes ``notices.jsonl`` next to this file: notices of towns, each with its headline."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

ROWS = 300
TOWNS = ("Bern", "Brno", "Gent", "Graz", "Lyon", "Porto", "Turin", "Ulm")
PLACES = ("library", "market", "museum", "park", "pool", "station", "theatre", "town hall")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
REASONS = ("a burst pipe", "a concert", "a power cut", "a strike", "heavy snow", "repairs")
FRAMES = (
    "The {place} in {town} will be closed on {day} because of {reason}.",
    "Because of {reason}, visitors to {town} will find the {place} closed on {day}.",
    "On {day} nobody can enter the {place} in {town}. The cause is {reason}.",
)
REMARKS = (
    "The mayor asks everybody to be patient.",
    "Tickets that were bought before can be returned at the office.",
    "Those who have questions may call the town at any time.",
    "It opens again on the day after that, at nine.",
    "The newspaper was told so by two of the people who work there.",
)


def rows() -> Iterator[dict[str, str]]:
    """Yields notices of a town, each with its headline."""
    draw = random.Random(1)
    seen = set()
    while len(seen) < ROWS:
        said = {
            "town": draw.choice(TOWNS),
            "place": draw.choice(PLACES),
            "day": draw.choice(DAYS),
            "reason": draw.choice(REASONS),
        }
        headline = "{town} {place} closed on {day}: {reason}".format(**said)
        if headline not in seen:
            seen.add(headline)
            text = f"{draw.choice(FRAMES).format(**said)} {draw.choice(REMARKS)}"
            yield {"document": text, "summary": headline}


def main(folder: Path) -> None:
    """Writes the same file each time."""
    lines = [json.dumps(row) for row in rows()]
    (folder / "notices.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)

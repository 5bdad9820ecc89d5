"""Generator of order e-mails with their content as JSON, from a seed.

Each mail is put together from the lists below: a greeting, two or three lines of goods with
quantities in digits or words, a day, and at times a correction ("no, make that 4 lamps"), a mention
of an older order, which is not part of this one, and slips of the keyboard. The answer follows from
the same draw, so that it is right by construction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

# For training, and held out.
SEEDS = {"train": 1, "validation": 2}
SYSTEM = "Turn the order into JSON with the keys name, items and day (MM-DD)."
_FIRST = (
    *("Ana", "Boris", "Carla", "Deniz", "Emil", "Farah", "Greta", "Hugo", "Ines", "Jonas", "Keiko"),
    *("Lars", "Mira", "Nils", "Olga", "Pablo", "Rosa", "Sven", "Tara", "Yusuf"),
)
_LAST = (
    *("Adler", "Brandt", "Costa", "Dubois", "Eriksen", "Fischer", "Garcia", "Horvat", "Ito"),
    *("Jensen", "Keller", "Lopez", "Meyer", "Novak", "Olsen", "Peters", "Rossi", "Silva", "Weber"),
)
# One and several, as they are written; the second is what the JSON says.
_GOODS = (
    *(("mug", "mugs"), ("lamp", "lamps"), ("chair", "chairs"), ("desk", "desks")),
    *(("candle", "candles"), ("cushion", "cushions"), ("vase", "vases"), ("rug", "rugs")),
    *(("box of tea", "boxes of tea"), ("bag of rice", "bags of rice"), ("shelf", "shelves")),
    *(("glass", "glasses"), ("knife", "knives"), ("brush", "brushes"), ("towel", "towels")),
)
_WORDS = {
    **{1: ("one", "1", "a"), 2: ("two", "2", "a pair of"), 3: ("three", "3")},
    **{4: ("four", "4"), 5: ("five", "5"), 6: ("six", "6", "half a dozen"), 7: ("seven", "7")},
    **{8: ("eight", "8"), 10: ("ten", "10"), 12: ("twelve", "12", "a dozen")},
    **{20: ("twenty", "20"), 24: ("24", "two dozen")},
}
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_OPENINGS = ("Hi,", "Hello there,", "hey", "Dear team,", "Good morning!", "Hi again,")
_ASKS = ("we need", "pls send", "I'd like to order", "could you ship", "please send us", "need")
_DAYS = ("by {day}", "for {day}", "to arrive by {day}", "latest {day}")
_CORRECTIONS = ("no, make that {new}", "sorry, {new}", "wait - {new} please")
_OLD = ("Last time the {old} came late.", "The {old} from March were great!", "No {old} this time.")
_ENDINGS = ("thx, {name}", "Best, {name}", "{name}", "Cheers {name}", "Regards\n{name}")


def order_rows(
    count: int, seed: int, besides: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Returns conversations in which an e-mail is answered with its order as JSON.

    ``seed`` decides all of them; no two are the same, and none of ``besides`` is among them.
    """
    draw, seen = random.Random(seed), set(besides)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        mail, order = order_mail(draw)
        if mail not in seen:
            seen.add(mail)
            rows.append(row_of(mail, order))
    return rows


def order_splits(train: int, held_out: int) -> dict[str, list[dict[str, Any]]]:
    """Returns conversations to learn from, and others, of another seed, to be judged by."""
    judged = order_rows(held_out, SEEDS["validation"])
    mails = frozenset(row["messages"][1]["content"] for row in judged)
    return {"train": order_rows(train, SEEDS["train"], mails), "validation": judged}


def written_rows(splits: Mapping[str, list[dict[str, Any]]]) -> str:
    """Returns rows by split as JSONL."""
    return "".join(
        json.dumps({**row, "split": split}) + "\n" for split, rows in splits.items() for row in rows
    )


def row_of(mail: str, order: dict[str, Any]) -> dict[str, Any]:
    """Returns a conversation of an e-mail and its order."""
    contents = {"system": SYSTEM, "user": mail, "assistant": compact(order)}
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()]}


def compact(order: dict[str, Any]) -> str:
    """Returns an order as JSON without spaces, which would be tokens too."""
    return json.dumps(order, separators=(",", ":"))


def order_mail(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Returns an e-mail and the order in it."""
    name = f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"
    *goods, other = draw.sample(_GOODS, draw.choice((2, 3, 3)))
    items = {several: draw.choice(list(_WORDS)) for _, several in goods}
    lines = [_quantity(draw, one, items[one[1]]) for one in goods]
    parts = [f"{draw.choice(_ASKS)} {' and '.join(lines)}"]
    month, day = draw.randint(1, 12), draw.randint(1, 28)
    parts[0] += " " + draw.choice(_DAYS).format(day=_day(draw, month, day)) + "."
    if draw.random() < 0.35:
        changed = draw.choice(goods)
        items[changed[1]] = draw.choice([n for n in _WORDS if n != items[changed[1]]])
        new = _quantity(draw, changed, items[changed[1]])
        parts.append(draw.choice(_CORRECTIONS).format(new=new) + ".")
    if draw.random() < 0.35:
        parts.insert(draw.choice((0, len(parts))), draw.choice(_OLD).format(old=other[1]))
    ending = draw.choice(_ENDINGS).format(name=name)
    mail = f"{draw.choice(_OPENINGS)} {_slips(draw, ' '.join(parts))} {ending}"
    return mail, {"name": name, "items": items, "day": f"{month:02d}-{day:02d}"}


def _quantity(draw: random.Random, good: tuple[str, str], number: int) -> str:
    return f"{draw.choice(_WORDS[number])} {good[number != 1]}"


def _day(draw: random.Random, month: int, day: int) -> str:
    name = _MONTHS[month - 1]
    end = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    written: tuple[Callable[[], str], ...] = (
        lambda: f"{name} {day}",
        lambda: f"the {day}{end} of {name}",
        lambda: f"{day} {name[:3]}",
        lambda: f"{name[:3]} {day}{end}",
    )
    return draw.choice(written)()


def _slips(draw: random.Random, text: str) -> str:
    """Returns a text in which a few neighbouring letters have changed places."""
    letters = list(text)
    for place in range(1, len(letters) - 2):
        inside_a_word = all(one.isalpha() for one in letters[place - 1 : place + 3])
        if inside_a_word and draw.random() < 0.01:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)

"""Parallel coordinates as server-rendered SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradio_app.pages.plot import Axis, linear, logarithmic
from gradio_app.pages.templating import render
from gradio_app.recipe.form import format_value
from gradio_app.runs.formatting import format_number
from gradio_app.texts import Texts

# From here on, the largest number is so many times the smallest that an axis is logarithmic.
_LOGARITHMIC_FROM = 50
# Of more numbers, the axis has round ticks.
_MOST_TICKS = 8
# Numbers with more characters are rounded.
_LONGEST = 6


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: What it is called.
        values: A number or a text for each axis.
        best: Whether it is the best one.
        share: How good it is, from 0 (worst) to 1.
    """

    name: str
    values: Sequence[Any]
    best: bool
    share: float


def parallel_coordinates(titles: Sequence[str], lines: Sequence[Line], t: Texts) -> str:
    """Returns the HTML of a plot of one line or more, whose last axis is the metric."""
    places, axes = [], []
    for number, title in enumerate(titles):
        place, ticks = _axis([line.values[number] for line in lines], t)
        across = number / max(1, len(titles) - 1)
        axes.append((title, across, ticks))
        places.append((across, place))
    drawn = [
        {
            "name": line.name,
            "best": line.best,
            "opacity": f"{0.25 + 0.6 * line.share:.2f}",
            "path": "M"
            + "L".join(
                f"{1000 * across:.0f} {1000 * (1 - place[value]):.0f}"
                for (across, place), value in zip(places, line.values, strict=True)
            ),
        }
        # The best one lies above the others.
        for line in sorted(lines, key=lambda line: (line.best, line.share))
    ]
    return render("plot.parallel", t, axes=axes, lines=drawn)


def format_tried(value: Any, t: Texts) -> str:
    """Returns a value of a setting as it is typed, or shorter where it has too many digits."""
    text = format_value(value)
    if isinstance(value, (bool, str)) or value is None or len(text) <= _LONGEST:
        return t.localized(text) if isinstance(value, (int, float)) else text
    return format_number(value, t)


def _axis(values: Sequence[Any], t: Texts) -> tuple[dict[Any, float], list[tuple[float, str]]]:
    """Returns where each value is, from 0 (least) to 1, and the ticks with their labels."""
    if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in values):
        known = list(dict.fromkeys(values))
        place = {one: (n + 0.5) / len(known) for n, one in enumerate(known)}
        return place, [(place[one], format_tried(one, t)) for one in known]
    known = sorted(set(values))
    wide = known[0] > 0 and known[-1] / known[0] >= _LOGARITHMIC_FROM
    found = logarithmic(known) if wide else linear(known)
    if len(known) <= _MOST_TICKS:
        # The values themselves, from end to end.
        margin = 0.0 if known[0] < known[-1] else abs(known[0]) / 10 or 1.0
        found = Axis(known[0] - margin, known[-1] + margin, tuple(known), wide)
    place = {one: found.place(one) for one in known}
    return place, [(found.place(tick), format_tried(tick, t)) for tick in found.ticks]

"""Line plots as server-rendered SVG.

Text and grid take their colours from the page, so that light and dark need no new picture; axes
are numbers whatever the data is, linear or logarithmic; and the first point is seen, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradio_app.pages.templating import message, render
from gradio_app.runs.formatting import format_metric, format_number
from gradio_app.texts import Texts

Curve = Sequence[tuple[float, float]]
_TICKS = 6
# Curves with more points show as lines alone.
_MAX_MARKED_POINTS = 60


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: As in the legend.
        color: CSS color, readable on white and on the dark ground.
        points: Pairs of x and y, x rising; both are finite.
    """

    name: str
    color: str
    points: Curve


@dataclass(frozen=True)
class Axis:
    """What an axis reaches, and its ticks; a logarithmic one is as long as its powers of ten."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Returns where a value is, from 0 (least) to 1."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def linear(values: Sequence[float], whole: bool = False) -> Axis:
    """Returns an axis with round ticks around one value or more; steps have whole ticks."""
    low, high = min(values), max(values)
    if low == high:
        margin = 1.0 if whole else abs(low) / 10 or 1.0
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    step = _round_step((high - low) / _TICKS)
    step = max(1.0, math.ceil(step)) if whole else step
    if not whole:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first = math.ceil(low / step - 1e-9)
    count = int(math.floor(high / step + 1e-9)) - first + 1
    return Axis(low, high, tuple((first + place) * step for place in range(count)))


def logarithmic(values: Sequence[float]) -> Axis:
    """Returns a logarithmic axis around values above zero; its ticks are 1, 2 and 5 times 10^n."""
    low, high = min(values), max(values)
    steps = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        for factor in (1, 2, 5)
    ]
    bottom = max(one for one in steps if one <= low * (1 + 1e-9))
    top = min(one for one in steps if one >= high * (1 - 1e-9) and one > bottom)
    ticks = [one for one in steps if bottom <= one <= top]
    if len(ticks) > 2 * _TICKS:
        ticks = [one for one in ticks if math.log10(one).is_integer()] or ticks
    return Axis(bottom, top, tuple(ticks), logarithmic=True)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def plot(
    series: Sequence[Series],
    t: Texts,
    *,
    x_title: str,
    y_title: str,
    empty: str,
    log_y: bool = False,
    whole_x: bool = True,
    from_zero: bool = False,
) -> str:
    """Returns the HTML of a plot; its curves lack what has no logarithm where y is logarithmic.

    With ``from_zero``, the axis of y begins at 0.
    """
    drawn = [
        Series(one.name, one.color, [(x, y) for x, y in one.points if y > 0 or not log_y])
        for one in series
    ]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return message("plot empty", empty, t, role="")
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + [0.0] * from_zero
    across, up = linear(xs, whole_x), logarithmic(ys) if log_y else linear(ys)
    return render(
        "plot.plot",
        t,
        series=[_paths(one, across, up) for one in drawn],
        x_title=x_title,
        y_title=y_title,
        points=_pointer_labels(drawn, across, x_title, t),
        x_ticks=[(across.place(tick), _format_tick(tick, t)) for tick in across.ticks],
        y_ticks=[(up.place(tick), format_number(tick, t)) for tick in up.ticks],
    )


def curve_table(curves: Mapping[str, Curve], x_title: str, t: Texts) -> str:
    """Returns points of curves, by name, as a table with a row for each x."""
    known = {name: dict(points) for name, points in curves.items()}
    rows = [
        (
            _format_x(x, t),
            [format_metric(points[x], t) if x in points else "" for points in known.values()],
        )
        for x in sorted({x for points in known.values() for x in points})
    ]
    head, label = [x_title, *known], t("run.as_table")
    return render("parts.table", t, empty="\u2013", label=label, head=head, rows=rows)


def _format_x(value: float, t: Texts) -> str:
    return f"{value:.0f}" if float(value).is_integer() else format_number(value, t)


def _format_tick(value: float, t: Texts) -> str:
    return f"{value:.0f}" if float(value).is_integer() else t.localized(f"{value:g}")


def _paths(one: Series, across: Axis, up: Axis) -> dict[str, str]:
    """Returns a line; a point is a line without length, which stays round however it is bent."""
    places = [
        f"{round(1000 * across.place(x), 1):g} {round(1000 * (1 - up.place(y)), 1):g}"
        for x, y in one.points
    ]
    marked = len(places) <= _MAX_MARKED_POINTS
    dots = "".join(f"M{place}h0" for place in places) if marked else ""
    return {"name": one.name, "color": one.color, "path": "M" + "L".join(places), "dots": dots}


def _pointer_labels(drawn: Sequence[Series], across: Axis, x_title: str, t: Texts) -> str:
    """Returns as JSON what is said where the pointer is: the place of each x, and its values."""
    rows: dict[float, list[str]] = {}
    for one in drawn:
        for x, y in one.points:
            rows.setdefault(x, []).append(f"{one.name} {format_number(y, t)}")
    found = [
        [round(across.place(x), 4), f"{x_title} {_format_x(x, t)}: {', '.join(rows[x])}"]
        for x in sorted(rows)
    ]
    return json.dumps(found, ensure_ascii=False)

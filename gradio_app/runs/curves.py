"""Curves for plotting: downsampling that keeps extremes, and smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import TypeVar

Points = list[tuple[float, float]]
Item = TypeVar("Item")
# More make a browser slow, and no screen shows them.
MAX_POINTS = 500
# With fewer points, a trend cannot be distinguished from noise.
MIN_POINTS = 20


def downsample(points: Points, most: int = MAX_POINTS) -> Points:
    """Returns at most ``most`` of the points: of each stretch the least and the greatest.

    A peak of a single step is still there, and so are the first point and the last. Values that
    are not finite stay if a stretch has nothing else.
    """
    if len(points) <= most:
        return list(points)
    inner = points[1:-1]
    stretches = max(1, (most - 2) // 2)
    kept = [points[0]]
    for place in range(stretches):
        begin = place * len(inner) // stretches
        end = (place + 1) * len(inner) // stretches
        stretch = inner[begin:end]
        known = [point for point in stretch if math.isfinite(point[1])] or stretch[:1]
        extremes = {min(known, key=_value), max(known, key=_value)} if known else set()
        kept += sorted(extremes)
    return [*kept, points[-1]]


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Returns the first item, the last one, and those evenly between: at most ``most``."""
    last = len(items) - 1
    if last < most:
        return list(items)
    return [items[round(last * place / (most - 1))] for place in range(most)]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def smooth(points: Points, weight: float) -> Points:
    """Returns the exponential moving average of the points.

    ``weight`` is how much of the average so far stays, 0 to 1; corrected at the beginning, so that
    the first point is not pulled to zero (as in Adam, arXiv:1412.6980, section 3).
    """
    if not 0 < weight < 1:
        return list(points)
    made: Points = []
    mean, seen = 0.0, 0
    for step, value in points:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            seen += 1
        made.append((step, mean / (1 - weight**seen) if seen else value))
    return made


def finite_points(points: Points) -> Points:
    """Returns the points whose values are numbers."""
    return [point for point in points if math.isfinite(point[1])]


def trend(points: Points) -> int | None:
    """Returns -1 if the values have been falling lately, 1 if rising, 0 if neither can be said.

    The mean of the last quarter is held against that of the quarter before. A difference counts
    where it is more than one percent, and more than twice its standard error: losses of single
    batches jump. Of fewer than ``MIN_POINTS`` points nothing is said: ``None``.
    """
    values = [value for _, value in finite_points(points)]
    if len(values) < MIN_POINTS:
        return None
    part = len(values) // 4
    last, before = values[-part:], values[-2 * part : -part]
    now, then = fmean(last), fmean(before)
    error = math.sqrt((variance(last) + variance(before)) / part)
    if abs(now - then) <= max(0.01 * abs(then), 2 * error):
        return 0
    return 1 if now > then else -1


def relative_increase(points: Points) -> tuple[float, float] | None:
    """Returns first and last level of values that end well above where they began.

    Both are means over a quarter of the points; ``None`` where they have not risen by a tenth, or
    there are fewer than ``MIN_POINTS`` points.
    """
    values = [value for _, value in finite_points(points)]
    if len(values) < MIN_POINTS:
        return None
    part = len(values) // 4
    first, last = fmean(values[:part]), fmean(values[-part:])
    return (first, last) if last > first + 0.1 * abs(first) else None

"""Bin packing of examples into rows of a fixed length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

# Lengths that may join the longest example of a row: so many of the longest that fit, and of the
# shortest. Steps of the search for all rows, each of a microsecond or less.
MOST_SIZES, MOST_STEPS = 64, 2_000_000


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns the places of the examples of each row, in as few rows as two ways find.

    One is best fit, the longest first. In the other, a row holds the longest example that is left
    and, of the sums of others that were looked at, those that fill it best, long ones first; rows
    of like content follow each other. Of more examples than can be searched, it is best fit.

    ``lengths`` are at most ``capacity``, both in tokens.
    """
    fitted, searched = _fit_rows(lengths, capacity), _search_rows(lengths, capacity)
    return fitted if searched is None or len(fitted) < len(searched) else searched


def _fit_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns rows by best fit: the longest example first, each into the fullest row for it."""
    rows: list[list[int]] = []
    # Rows by the space that is left in them, and those spaces, the least first.
    by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        at = bisect_left(spaces, lengths[place])
        if at < len(spaces):
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        else:
            space, row = capacity, []
            rows.append(row)
        row.append(place)
        space -= lengths[place]
        if space not in by_space:
            by_space[space] = []
            insort(spaces, space)
        by_space[space].append(row)
    return rows


def _search_rows(lengths: Sequence[int], capacity: int) -> list[list[int]] | None:
    """Returns rows by a search for each, or ``None`` where that would take long."""
    places: dict[int, list[int]] = {}
    for place in range(len(lengths) - 1, -1, -1):
        places.setdefault(lengths[place], []).append(place)
    left, sizes = {length: len(those) for length, those in places.items()}, sorted(places)
    rows: list[list[int]] = []
    steps = 0
    while sizes:
        pattern, taken = _best_fill(left, sizes, capacity)
        steps += taken
        if steps > MOST_STEPS:
            return None
        # As often as there are examples for it: the next best one is about as good, and searched.
        for _ in range(min(left[length] // times for length, times in pattern.items())):
            rows.append([places[n].pop() for n, times in pattern.items() for _ in range(times)])
        for length in pattern:
            left[length] = len(places[length])
            if not left[length]:
                del sizes[bisect_left(sizes, length)]
    return rows


def _best_fill(left: dict[int, int], sizes: list[int], capacity: int) -> tuple[dict[int, int], int]:
    """Returns how many examples of each length go together into a row, and the work it was.

    ``left`` is how many there are of each; ``sizes`` are the lengths there are, the shortest first.
    """
    longest = sizes[-1]
    room = capacity - longest
    fitting = bisect_right(sizes, room)
    long = max(0, fitting - MOST_SIZES)
    everything = (1 << (room + 1)) - 1
    # Bit n of a set of sums: some of the examples so far have n tokens together.
    sums = [1]
    parts: list[tuple[int, int]] = []
    for length in reversed(sizes[: min(long, MOST_SIZES)] + sizes[long:fitting]):
        most = min(left[length] - (length == longest), room // length if length else 0)
        times = 1
        while most > 0:
            times = min(times, most)
            parts.append((length, times))
            sums.append((sums[-1] | sums[-1] << length * times) & everything)
            most, times = most - times, 2 * times
        if sums[-1] >> room:
            # A full row: more lengths would not change what is taken.
            break
    best = sums[-1].bit_length() - 1
    pattern = {longest: 1}
    for i in range(len(parts) - 1, -1, -1):
        length, times = parts[i]
        # Long ones first: what short ones can do, they can do later too.
        if not sums[i] >> best & 1:
            best -= length * times
            pattern[length] = pattern.get(length, 0) + times
    return pattern, len(parts) * (1 + room // 2048)

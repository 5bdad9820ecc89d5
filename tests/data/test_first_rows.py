"""Contents that came before: as a dictionary finds them, in less memory."""

import hashlib
import tracemalloc

from lightning_peft.data.row_content import FirstRows, FirstSeen


def digest(number):
    return hashlib.sha256(str(number).encode()).digest()[:16]


def test_it_finds_what_a_dictionary_finds():
    seen, expected = FirstSeen("BIQ"), {}
    for row in range(6000):
        # Half of them share the bytes that say where they are looked for.
        one = digest(row * row % 4001)
        one = bytes(8) + one[8:] if row % 100 == 0 else one
        numbers = (row % 3, row % 70_000, row + (1 << 40))
        assert seen.setdefault(one, *numbers) == expected.setdefault(one, numbers)
    assert len(seen) == len(expected) < 4001


def test_an_entry_takes_fifty_bytes_at_most():
    tracemalloc.start()
    seen = FirstSeen("BIQ")
    for row in range(6000):
        seen.setdefault(digest(row), 0, 0, row)
    size = tracemalloc.get_traced_memory()[0] / 6000
    tracemalloc.stop()
    # 29 are its own.
    assert 29 < size < 50


def test_a_row_is_compared_with_the_first_one_of_its_content():
    rows = FirstRows(keep_duplicates=False)
    assert rows.problems("a", 1, digest(1), "train") == ([], False)
    assert rows.problems("a", 1, digest(1), "train") == ([], False)
    same = rows.problems("a", 2, digest(1), "train")
    assert same == ([("duplicate", "is the same as row 1")], False)
    other = rows.problems("b", 1, digest(1), "train")
    assert other == ([("duplicate", "is the same as row 1 of a")], False)
    leak = "is for test and the same as row 1 of a, which is for train"
    assert rows.problems("b", 2, digest(1), "test") == ([("leak", leak)], False)
    kept = FirstRows(keep_duplicates=True)
    assert kept.problems("a", 1, digest(1), "train") == ([], False)
    assert kept.problems("a", 2, digest(1), "train") == ([], True)

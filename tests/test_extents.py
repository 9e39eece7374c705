"""The extent allocator against a plain list of flags."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprompt.extents import Extents, Rooms


def holes_of(used: list[bool]) -> list[tuple[int, int]]:
    """Maximal runs of free tokens, from flags."""
    holes, start = [], None
    for i, flag in enumerate([*used, True]):
        if not flag and start is None:
            start = i
        if flag and start is not None:
            holes.append((start, i - start))
            start = None
    return holes


def test_first_fit_takes_the_first_hole_that_is_large_enough():
    extents = Extents(20)
    extents.take(0, 20)
    for start, length in ((2, 3), (8, 5), (15, 5)):
        extents.release(start, length)
    assert (extents.find(3), extents.find(4), extents.find(5), extents.find(6)) == (2, 8, 8, None)
    assert (extents.used, extents.free, extents.largest, extents.tail) == (7, 13, 5, 5)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_neighbours_join_in_whatever_order_they_are_freed(order):
    extents = Extents(12)
    extents.take(0, 12)
    for i in order:
        extents.release(4 * i, 4)
    assert extents.holes == ((0, 12),)


def test_growth_joins_the_free_tail():
    extents = Extents()
    assert (extents.find(1), extents.largest, extents.tail) == (None, 0, 0)
    extents.grow(5)
    extents.take(0, 3)
    extents.grow(9)
    assert extents.holes == ((3, 6),)
    extents.grow(9)
    assert extents.holes == ((3, 6),)
    with pytest.raises(ValueError, match="cannot shrink"):
        extents.grow(8)


@pytest.mark.parametrize(("start", "length"), [(2, 1), (0, 5), (8, 3), (4, 0), (-1, 1)])
def test_taking_what_is_not_free_is_refused(start, length):
    extents = Extents(10)
    extents.take(2, 2)
    with pytest.raises(ValueError, match="not free"):
        extents.take(start, length)
    assert extents.holes == ((0, 2), (4, 6))


@pytest.mark.parametrize(("start", "length"), [(1, 2), (3, 2), (9, 2), (2, 0), (-1, 1), (5, 1)])
def test_releasing_what_is_not_used_is_refused(start, length):
    extents = Extents(10)
    extents.take(2, 2)
    extents.take(8, 2)
    with pytest.raises(ValueError, match="not in use"):
        extents.release(start, length)
    assert extents.holes == ((0, 2), (4, 4))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 23), st.integers(1, 6)), max_size=40))
def test_equals_a_list_of_flags(steps):
    used, extents = [False] * 24, Extents(24)
    for taking, start, length in steps:
        span = used[start : start + length]
        fits = start + length <= 24 and all(flag is not taking for flag in span)
        act = extents.take if taking else extents.release
        if fits:
            act(start, length)
            used[start : start + length] = [taking] * length
        else:
            with pytest.raises(ValueError, match="is not"):
                act(start, length)
        assert list(extents.holes) == holes_of(used)
        assert extents.used == sum(used)
        want = next((s for s, n in holes_of(used) if n >= length), None)
        assert extents.find(length) == want


def test_rooms_lie_between_fixed_extents():
    extents = Extents(30)
    extents.take(0, 30)
    for start, length in ((1, 2), (5, 1), (14, 4), (29, 1)):
        extents.release(start, length)
    rooms = Rooms(extents, [(20, 5), (10, 4), (14 + 4, 2)])  # in any order, some touching
    assert [(r.low, r.high, r.free) for r in rooms] == [(0, 10, 3), (14, 18, 4), (20, 20, 0), (25, 30, 1)]
    assert [rooms.at(t).low for t in (0, 9, 14, 17, 25, 29)] == [0, 0, 14, 14, 25, 25]


def test_without_fixed_extents_there_is_one_room():
    assert [(r.low, r.high, r.free) for r in Rooms(Extents(7), [])] == [(0, 7, 7)]

"""Boxes against sets of points."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tri_mpk.scheduler.boxes import cut_in_pieces, first_uncovered, intersect, subtract
from tri_mpk.scheduler.graph import Box
from tri_mpk.scheduler.regions import TensorAccesses

interval = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda i: (min(i), max(i) + 1))


def boxes(dims: int) -> st.SearchStrategy[Box]:
    return st.tuples(*[interval] * dims)


def points(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(lo, hi) for lo, hi in box)))


@given(st.integers(1, 3).flatmap(lambda dims: st.tuples(boxes(dims), st.lists(boxes(dims), max_size=8))))
def test_first_uncovered(case):
    box, covers = case
    missing = points(box).difference(*map(points, covers))
    hole = first_uncovered(box, covers)
    assert (hole is None) == (not missing)
    assert hole is None or points(hole) <= missing


@given(st.lists(st.integers(0, 12), min_size=2, max_size=6, unique=True), st.booleans(), st.data())
def test_tiles_in_a_row_cover_and_a_gap_is_found(cuts, along_rows, data):
    """The way ops cut tensors, along either dimension, in any order."""
    cuts.sort()
    tiles = [((0, 3), (lo, hi)) for lo, hi in zip(cuts, cuts[1:], strict=False)]
    box = ((0, 3), (cuts[0], cuts[-1]))
    if along_rows:
        box, tiles = box[::-1], [tile[::-1] for tile in tiles]
    tiles = data.draw(st.permutations(tiles))
    assert first_uncovered(box, tiles) is None
    gone = tiles.pop()
    assert first_uncovered(box, tiles) == gone


@given(boxes(2), boxes(2))
def test_subtract_and_intersect(a, b):
    common = intersect(a, b)
    assert (points(common) if common else set()) == points(a) & points(b)
    rest = [points(part) for part in subtract(a, b)]
    assert set().union(*rest) == points(a) - points(b) and sum(map(len, rest)) == len(points(a) - points(b))


@given(st.integers(0, 3).flatmap(lambda dims: st.lists(boxes(dims), min_size=1, max_size=8, unique=True)))
def test_boxes_share_pieces_where_they_share_points(some):
    """A piece is known by the boxes it is part of, as a point is by those it lies in."""
    pieces = cut_in_pieces(tuple(some))
    held = {piece: {box for box in some if piece in pieces[box]} for piece in set().union(*pieces.values())}
    lying = {frozenset(box for box in some if point in points(box)) for box in some for point in points(box)}
    assert {frozenset(holders) for holders in held.values()} == lying
    assert all(len(numbers) == len(set(numbers)) for numbers in pieces.values())


@pytest.mark.parametrize("num_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("largest", [1, 8, 400])
def test_overlaps_are_all_pairs_that_intersect(num_dims, largest):
    rng = random.Random(num_dims)
    accesses = TensorAccesses("x")
    for task in range(700):  # several chunks
        lows = [rng.randrange(400) for _ in range(num_dims)]
        accesses.add(task, tuple((lo, lo + rng.randint(1, largest)) for lo in lows), is_write=True)
    expected = [{j for j, b in enumerate(accesses.boxes) if intersect(a, b) is not None} for a in accesses.boxes]
    assert [set(near.tolist()) for near in accesses.overlaps()] == expected

"""Arithmetic on boxes: intersection, difference, common pieces, and whether boxes cover another."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import prod

import numpy as np

from .graph import Box


def is_empty(box: Box) -> bool:
    for lo, hi in box:  # noqa: SIM110  a generator takes three times as long
        if lo >= hi:
            return True
    return False


def volume(box: Box) -> int:
    return prod(hi - lo for lo, hi in box)


def intersect(a: Box, b: Box) -> Box | None:
    """The common part, or None: `((0, 4),)` and `((2, 8),)` share `((2, 4),)`, `()` meets `()`."""
    common = []
    for (a_lo, a_hi), (b_lo, b_hi) in zip(a, b, strict=True):
        lo, hi = a_lo if a_lo > b_lo else b_lo, a_hi if a_hi < b_hi else b_hi
        if lo >= hi:
            return None
        common.append((lo, hi))
    return tuple(common)


def subtract(a: Box, b: Box) -> list[Box]:
    """`a` without `b` as disjoint boxes: `[0,8)` without `[2,4)` is `[0,2)` and `[4,8)`."""
    common = intersect(a, b)
    if common is None:
        return [a]
    parts = []
    for dim, ((lo, hi), (cut_lo, cut_hi)) in enumerate(zip(a, common, strict=True)):
        # Earlier dimensions are already narrowed to the common part, so the parts never overlap.
        if lo < cut_lo:
            parts.append((*common[:dim], (lo, cut_lo), *a[dim + 1 :]))
        if cut_hi < hi:
            parts.append((*common[:dim], (cut_hi, hi), *a[dim + 1 :]))
    return parts


@lru_cache(maxsize=16)  # caches of all layers are cut alike
def overlaps(boxes: tuple[Box, ...]) -> list[np.ndarray]:
    """Per box the numbers of all boxes that it intersects, itself included.

    Boxes are sorted along the dimension in which they differ most, so that a chunk of them meets a short stretch of
    the others when tiles are small, and at worst all of them.
    """
    bounds = np.array(boxes, dtype=np.int64).reshape(len(boxes), -1, 2)
    if not bounds.size:  # scalars
        return [np.zeros(1, dtype=np.int64)]
    lo, hi = bounds[..., 0].T.copy(), bounds[..., 1].T.copy()
    dim = max(range(len(lo)), key=lambda dim: len(np.unique(lo[dim])))
    order = np.argsort(lo[dim], kind="stable")
    lo, hi = lo[:, order], hi[:, order]
    reach = np.maximum.accumulate(hi[dim])
    found: list[np.ndarray] = [order] * len(order)
    for start in range(0, len(order), 256):  # in chunks: memory stays linear
        rows = slice(start, start + 256)
        near = slice(
            np.searchsorted(reach, lo[dim, start], side="right"),
            np.searchsorted(lo[dim], hi[dim, rows].max(), side="left"),
        )
        hit = np.ones((len(order[rows]), len(order[near])), dtype=bool)
        for i in range(len(lo)):
            hit &= lo[i, rows, None] < hi[i, near]
            hit &= hi[i, rows, None] > lo[i, near]
        row, column = np.nonzero(hit)
        ends = np.searchsorted(row, np.arange(len(hit) + 1)).tolist()
        others = order[near][column]
        for box, lo_end, hi_end in zip(order[rows].tolist(), ends, ends[1:], strict=False):
            found[box] = others[lo_end:hi_end]
    return found


@lru_cache(maxsize=16)
def cut_in_pieces(boxes: tuple[Box, ...]) -> dict[Box, list[int]]:
    """Per box (all differ) the numbers of its pieces, no two of which overlap: `[0,8)`, `[4,12)` are 0, 1 and 0, 2."""
    pieces: list[Box] = []
    holders: list[list[int]] = []  # per piece the boxes it is part of
    found: list[list[int]] = [[] for _ in boxes]

    def add_piece(piece: Box, parts_of: list[int]) -> None:
        for number in parts_of:
            found[number].append(len(pieces))
        pieces.append(piece)
        holders.append(parts_of)

    near = overlaps(boxes)
    for number in sorted(range(len(boxes)), key=lambda number: volume(boxes[number])):  # small ones are pieces
        box, rest = boxes[number], [boxes[number]]
        meeting = {piece for other in near[number].tolist() for piece in found[other]}
        for piece in sorted(meeting, key=pieces.__getitem__):
            whole, common = pieces[piece], intersect(pieces[piece], box)
            if common is None:
                continue
            pieces[piece] = common
            for part in subtract(whole, common):
                add_piece(part, list(holders[piece]))
            holders[piece].append(number)
            found[number].append(piece)
            rest = [part for old in rest for part in subtract(old, common)]
        for part in rest:
            add_piece(part, [number])
    return dict(zip(boxes, found, strict=True))


def first_uncovered(box: Box, covers: Iterable[Box]) -> Box | None:
    """A part of `box` that no box of `covers` holds, or None when their union holds all of it."""
    covers = list(covers)
    if any(_is_tiled(box, covers, dim) for dim in range(len(box))):
        return None
    rest = [box]
    for cover in sorted(covers):  # in order, so that few parts are open at any time
        rest = [part for old in rest for part in subtract(old, cover)]
        if not rest:
            return None
    return rest[0]


def _is_tiled(box: Box, covers: list[Box], dim: int) -> bool:
    """Whether boxes as wide as `box` in all other dimensions cover it one after another: how ops cut tensors."""
    reached, end = box[dim]
    for cover in sorted(covers, key=lambda cover: cover[dim]):
        lo, hi = cover[dim]
        if lo <= reached < hi and all(
            i == dim or (cover[i][0] <= box[i][0] and box[i][1] <= cover[i][1]) for i in range(len(box))
        ):
            reached = hi
    return reached >= end


def region_text(tensor: str, box: Box) -> str:
    """`x[0:1, 128:256]`"""
    return f"{tensor}[{', '.join(f'{lo}:{hi}' for lo, hi in box)}]"

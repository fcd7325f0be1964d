"""Arithmetic on boxes: intersection, difference, and whether boxes cover another."""

from __future__ import annotations

from collections.abc import Iterable

from .graph import Box


def is_empty(box: Box) -> bool:
    return any(lo >= hi for lo, hi in box)


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

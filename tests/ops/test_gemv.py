"""What a task reads at a time: slots of the weight ring, and blocks of rows whose sums fit their place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tri_mpk.ops.gemv import (
    BARRIERS_OFFSET,
    MAX_SLOTS,
    PIECES_OFFSET,
    RING_OFFSET,
    SQUARES_OFFSET,
    SUMS_BYTES,
    SUMS_OFFSET,
    SUMS_ROWS,
    WARPS,
    block_rows,
    slot_rows,
)
from tri_mpk.ops.op import Machine
from tri_mpk.program import NUM_WARPS
from tri_mpk.scheduler.device import SHARED_BYTES

RING = Machine(132, block_n=16, slot_bytes=32 << 10)
PLAIN = Machine(2, block_n=256, slot_bytes=0)


def power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@given(k=st.integers(1, 1 << 17))
def test_slots_are_as_many_rows_as_fit(k):
    rows = slot_rows(k, RING)
    assert power_of_2(rows) and rows <= 16
    assert rows == 1 or rows * k * 2 <= 32 << 10
    assert rows == 16 or 2 * rows * k * 2 > 32 << 10, "more would have fitted"


@given(k=st.integers(1, 1 << 17), matrices=st.sampled_from([1, 2]))
def test_the_sums_of_a_block_fit(k, matrices):
    slot, rows = slot_rows(k, RING), block_rows(k, RING, matrices)
    assert power_of_2(rows) and rows % slot == 0  # tl.arange, and whole slots but for the last one
    assert rows * matrices == SUMS_ROWS.value
    assert SUMS_ROWS.value * WARPS.value * 4 == SUMS_BYTES.value


@pytest.mark.parametrize(("k", "slot", "block"), [(256, 16, 256), (2048, 8, 256), (4096, 4, 256), (12288, 1, 256)])
def test_known_sizes(k, slot, block):
    assert (slot_rows(k, RING), block_rows(k, RING)) == (slot, block)


@given(k=st.integers(1, 1 << 17), matrices=st.sampled_from([1, 2]))
def test_without_a_ring_the_machine_decides(k, matrices):
    assert slot_rows(k, PLAIN) == 0 and block_rows(k, PLAIN, matrices) == 256


def test_what_lies_in_shared_memory_does_not_overlap():
    """Two barriers of 8 bytes per slot, the second ones 128 bytes on; a sum of squares per warp; for prefetching two
    barriers and a word; sums; slots.
    """
    assert WARPS.value == NUM_WARPS
    assert SHARED_BYTES.value <= BARRIERS_OFFSET.value
    assert 8 * MAX_SLOTS.value <= 128 and BARRIERS_OFFSET.value + 2 * 128 <= SQUARES_OFFSET.value
    assert SQUARES_OFFSET.value + 4 * WARPS.value <= PIECES_OFFSET.value and PIECES_OFFSET.value % 8 == 0
    assert PIECES_OFFSET.value + 2 * 8 + 4 <= SUMS_OFFSET.value
    assert SUMS_OFFSET.value + SUMS_BYTES.value <= RING_OFFSET.value and RING_OFFSET.value % 128 == 0

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
from tri_mpk.ops.op import Machine, next_power_of_2
from tri_mpk.program import NUM_WARPS
from tri_mpk.scheduler.device import SHARED_BYTES

RING = Machine(132, block_n=16, slot_bytes=32 << 10)
PLAIN = Machine(2, block_n=256, slot_bytes=0)


def power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@given(k=st.integers(1, 1 << 17), task_rows=st.integers(1, 2000))
def test_slots_are_as_many_rows_as_fit(k, task_rows):
    rows = slot_rows(k, RING, task_rows)
    assert rows <= 16 and 4 * rows >= 3 * next_power_of_2(rows)
    assert rows == 1 or rows * k * 2 <= 32 << 10
    assert rows == 16 or 2 * rows * k * 2 > 32 << 10, "more would have fitted"


@given(k=st.integers(1, 1 << 17), task_rows=st.integers(1, 2000), matrices=st.sampled_from([1, 2]))
def test_the_sums_of_a_block_fit(k, task_rows, matrices):
    slot, rows = slot_rows(k, RING, task_rows, matrices), block_rows(RING, matrices)
    assert power_of_2(rows)  # tl.arange
    if task_rows > rows:
        assert rows % slot == 0, "whole slots but for the last one"
    assert -(-min(task_rows, rows) // slot) * slot <= rows, "the last slot's rows have a place, too"
    assert rows * matrices == SUMS_ROWS.value
    assert SUMS_ROWS.value * WARPS.value * 4 == SUMS_BYTES.value


@pytest.mark.parametrize(
    ("k", "task_rows", "slot"),
    [
        (256, 100, 16), (1536, 100, 8), (2048, 100, 8), (2560, 100, 6), (3072, 100, 4), (4096, 100, 4), (5120, 100, 3),
        (5120, 255, 3), (5120, 256, 2), (5120, 1151, 2), (12288, 100, 1),
    ],
)  # fmt: skip
def test_known_sizes(k, task_rows, slot):
    assert slot_rows(k, RING, task_rows) == slot


@given(k=st.integers(1, 1 << 17), matrices=st.sampled_from([1, 2]))
def test_without_a_ring_the_machine_decides(k, matrices):
    assert slot_rows(k, PLAIN, 100, matrices) == 0 and block_rows(PLAIN, matrices) == 256


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

"""What ops on several ranks share: x = residual + parts[0] + parts[1] + ..., and pushing parts to all ranks.

A row of a matrix whose columns are shared out has a part of its dot product on every rank. The tasks that make a part
push it to all ranks, and whoever needs the whole vector adds it up while loading it, in the order of the ranks, so
that all ranks have the same bits. No task has to wait for a sum that another one makes. Each task also keeps a stretch
of the sum in memory: the residual that the next parts are added to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.gemv import end_rows, inverse_rms, load_segment, row_sums, stream_rows
from tri_mpk.ops.op import Cut, TensorHandle, even_ranges, next_power_of_2
from tri_mpk.scheduler.graph import Address, Region


@triton.jit
def load_sum(x_ptr, parts_ptr, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RANKS: tl.constexpr, RING: tl.constexpr):
    """A thread's part of the sum, as `load_segment` loads one of a vector. All loads are under way together."""
    x = load_segment(x_ptr, K, SLOT_ROWS, RING)
    parts = ()
    for rank in tl.static_range(RANKS):
        parts = parts + load_segment(parts_ptr + rank * K, K, SLOT_ROWS, RING)
    total = ()
    for i in tl.static_range(len(x)):
        value = x[i]
        for rank in tl.static_range(RANKS):
            value += parts[rank * len(x) + i]
        total = total + (value,)
    return total


@triton.jit
def sum_columns(x_ptr, parts_ptr, cols, mask, K: tl.constexpr, RANKS: tl.constexpr):
    """The sum at these columns."""
    value = tl.load(x_ptr + cols, mask=mask, other=0.0)
    for rank in tl.static_range(RANKS):
        value += tl.load(parts_ptr + rank * K + cols, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_kept(x_ptr, parts_ptr, first_kept, num_kept, K: tl.constexpr, KEPT: tl.constexpr, RANKS: tl.constexpr):
    """This task's stretch of the sum, [KEPT]. Before `load_sum`, so that all loads are under way together."""
    place = tl.arange(0, KEPT)
    return sum_columns(x_ptr, parts_ptr, first_kept + place, place < num_kept, K, RANKS)


@triton.jit
def store_kept(total_ptr, kept, first_kept, num_kept, KEPT: tl.constexpr):
    """Leaves it in memory. Behind the matrix, which it would hold up."""
    place = tl.arange(0, KEPT)
    tl.store(total_ptr + first_kept + place, kept, mask=place < num_kept)


@triton.jit
def row_sums_of_sum(
    ring, place, x_ptr, parts_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, SLOT_ROWS: tl.constexpr, RANKS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`row_sums` with gain * the sum."""
    if RING:
        return row_sums(
            ring, place, x_ptr, gain_ptr, weight_addr, block, num_rows, K, True, SLOT_ROWS, RING, WEIGHT, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
    else:
        first = tl.cast(block, tl.int64) * BLOCK_N
        weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
        rows = tl.arange(0, BLOCK_N)[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for col in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = col + tl.arange(0, BLOCK_K)[None, :]
            x = sum_columns(x_ptr, parts_ptr, cols, cols < K, K, RANKS)
            x *= tl.load(gain_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + rows * K + cols, mask=(rows < num_rows - first) & (cols < K), other=0.0)
            acc += w.to(tl.float32) * x
        return tl.sum(acc, axis=1)


@triton.jit
def dot_rows_of_sum(
    ring, x, x_ptr, parts_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, SLOT_ROWS: tl.constexpr, RANKS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`dot_rows` with gain * the sum; `x` is what `scale_segment` made of it."""
    end_rows(RING)
    rows_left = tl.minimum(num_rows - block * BLOCK_N, BLOCK_N)
    ring = stream_rows(ring, x, 0, rows_left, K, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    return ring, row_sums_of_sum(
        ring, 0, x_ptr, parts_ptr, gain_ptr, weight_addr, block, num_rows,
        K, SLOT_ROWS, RANKS, RING, WEIGHT, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def inverse_rms_of_sum(
    ring, x_ptr, parts_ptr, K: tl.constexpr, EPS: tl.constexpr, SLOT_ROWS: tl.constexpr, RANKS: tl.constexpr,
    RING: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`inverse_rms` of the sum."""
    if RING:
        return inverse_rms(ring, x_ptr, K, EPS, SLOT_ROWS, RING, BLOCK_K)
    else:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = start + tl.arange(0, BLOCK_K)
            x = sum_columns(x_ptr, parts_ptr, cols, cols < K, K, RANKS)
            squares += x * x
        return tl.rsqrt(tl.sum(squares, axis=0) / K + EPS)


def read_sum(cut: Cut, x: TensorHandle, parts: TensorHandle, total: TensorHandle | None = None) -> Cut:
    """Changes a cut so that its tasks read x + parts in place of x, and keep it in `total`, a stretch each."""
    num_ranks, size = parts.dims
    cut.pointers["parts_ptr"] = parts
    if total:
        cut.pointers["total_ptr"] = total
        cut.constants["KEPT"] = next_power_of_2(-(-size // len(cut.tasks)))
    for task, (lo, hi) in zip(cut.tasks, even_ranges(size, len(cut.tasks)), strict=True):
        task.reads += (parts.box((0, num_ranks), (0, size)),)
        task.fields["parts_ptr"] = Address(parts.name)
        if total:
            task.writes += (total.span(lo, hi),)
            task.fields |= {"total_ptr": Address(total.name), "first_kept": lo, "num_kept": hi - lo}
    return cut


def push_to_all(cut: Cut, *outputs: TensorHandle) -> Cut:
    """Changes a cut so that what its tasks write to these symmetric tensors goes to this rank's row, on all ranks.

    The row's place is for the tile function to add: pointers are aligned to 16 bytes, rows need not be.
    """
    names = {tensor.name for tensor in outputs}
    for task in cut.tasks:
        task.pushes = tuple(Region(r.tensor, r.box[1:]) for r in task.writes if r.tensor in names)
        task.writes = tuple(r for r in task.writes if r.tensor not in names)
        task.to_all_ranks = True
    return cut

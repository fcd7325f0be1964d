"""Streaming a weight matrix through registers: what all matrix-vector ops share.

A stage is four register tiles [BLOCK_N, BLOCK_K]: two groups of rows times two groups of columns. Two stages are in
flight, named `carry`; while one is multiplied the other is on its way. The last stages of a task are followed by the
first stages of the worker's next weight-reading task, loaded after the signal (a release fence waits for loads in
flight) and before that task's wait, so that the weight stream does not drain while a worker waits.

With BLOCK_N = num_warps and BLOCK_K = 256, a warp owns a row and a lane loads 16 bytes of bf16: neither the dot
products nor the normalisation need a CTA barrier. Activations are loaded by every warp for itself for the same reason.
"""

import triton
import triton.language as tl

from tri_mpk.scheduler.device import TASK_NEXT


@triton.jit
def load_stage(
    start, row_stride, group_stride, rows0, rows1, cols,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Four tiles: row group 0 at byte address `start`, row group 1 `group_stride` bytes on; 0 beyond rows and columns.

    ALIGN elements divide addresses, strides and column counts: the compiler sees that only through arithmetic.
    """
    align_bytes: tl.constexpr = ALIGN * WEIGHT.primitive_bitwidth // 8
    ptr0 = tl.multiple_of((start // align_bytes * align_bytes).to(tl.pointer_type(WEIGHT)), align_bytes)
    ptr1 = ((start + group_stride) // align_bytes * align_bytes).to(tl.pointer_type(WEIGHT))
    ptr1 = tl.multiple_of(ptr1, align_bytes)
    row_stride = row_stride // ALIGN * ALIGN
    cols = cols // ALIGN * ALIGN
    r = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_K)[None, :]
    offsets = r * row_stride + c
    mask0 = (r < rows0) & (c < cols)
    mask1 = (r < rows1) & (c < cols)
    mask2 = (r < rows0) & (c + BLOCK_K < cols)
    mask3 = (r < rows1) & (c + BLOCK_K < cols)
    w0 = tl.load(ptr0 + offsets, mask=mask0, other=0.0, eviction_policy="evict_first")
    w1 = tl.load(ptr1 + offsets, mask=mask1, other=0.0, eviction_policy="evict_first")
    w2 = tl.load(ptr0 + BLOCK_K + offsets, mask=mask2, other=0.0, eviction_policy="evict_first")
    w3 = tl.load(ptr1 + BLOCK_K + offsets, mask=mask3, other=0.0, eviction_policy="evict_first")
    return (w0, w1, w2, w3)


@triton.jit
def load_next(
    task_ptr,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first two stages of the weights that this worker reads after the given task."""
    start = tl.load(task_ptr + TASK_NEXT)
    row_stride = tl.load(task_ptr + TASK_NEXT + 1).to(tl.int32)
    group_stride = tl.load(task_ptr + TASK_NEXT + 2)
    rows = tl.load(task_ptr + TASK_NEXT + 3)
    cols = tl.load(task_ptr + TASK_NEXT + 4).to(tl.int32)
    rows0 = rows.to(tl.int32)
    rows1 = (rows >> 32).to(tl.int32)
    stage_bytes: tl.constexpr = 2 * BLOCK_K * WEIGHT.primitive_bitwidth // 8
    a = load_stage(start, row_stride, group_stride, rows0, rows1, cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)
    b = load_stage(
        start + stage_bytes, row_stride, group_stride, rows0, rows1, cols - 2 * BLOCK_K, WEIGHT, ALIGN, BLOCK_N, BLOCK_K
    )
    return (a, b)


@triton.jit
def load_activations(
    x_ptr, gain_ptr, col,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[col : col + BLOCK_K] in fp32, the same in all BLOCK_N rows, and its product with the gain of the norm.

    A residual stream comes in PARTS parts (those of a split K), which are added here in their order.
    """
    cols = col + tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    mask = cols < K
    x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * PART_STRIDE + cols, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        return x, x * tl.load(gain_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        return x, x


@triton.jit
def dot_stage(
    acc0, acc1, squares, stage, x_ptr, gain_ptr, col,
    K: tl.constexpr, PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for half in tl.static_range(2):
        x, scaled = load_activations(
            x_ptr, gain_ptr, col + half * BLOCK_K, K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K
        )
        acc0 += stage[2 * half].to(tl.float32) * scaled
        acc1 += stage[2 * half + 1].to(tl.float32) * scaled
        if NORM:
            squares += x * x
    return acc0, acc1, squares


@triton.jit
def dot_row_block(
    carry, x_ptr, gain_ptr, weight_addr, group_stride, block, num_rows,
    K: tl.constexpr, ROW_STRIDE: tl.constexpr, GROUP_ROWS: tl.constexpr,
    PARTS: tl.constexpr, PART_STRIDE: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products of row block `block` with x: two vectors [BLOCK_N], one per row group, and sum(x^2) in every row.

    Row group 1 lies GROUP_ROWS rows below group 0 (linear) or in another matrix altogether (GROUP_ROWS = 0: gate, up).
    `carry` holds the first two stages of this block and is returned with those of the task's next one.
    """
    a, b = carry
    stage_cols: tl.constexpr = 2 * BLOCK_K
    num_stages: tl.constexpr = (K + 2 * stage_cols - 1) // (2 * stage_cols) * 2  # even: a and b alternate
    block_rows: tl.constexpr = BLOCK_N + GROUP_ROWS
    elem_bytes: tl.constexpr = WEIGHT.primitive_bitwidth // 8
    acc0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for stage in tl.range(0, num_stages, 2, num_stages=1):
        last = stage + 2 >= num_stages
        next_col = tl.where(last, 0, (stage + 2) * stage_cols)
        next_block = tl.where(last, block + 1, block)
        rows0 = num_rows - next_block * block_rows
        rows1 = rows0 - GROUP_ROWS
        start = weight_addr + (next_block * block_rows).to(tl.int64) * (ROW_STRIDE * elem_bytes) + next_col * elem_bytes
        cols = K - next_col
        acc0, acc1, squares = dot_stage(
            acc0, acc1, squares, a, x_ptr, gain_ptr, stage * stage_cols, K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K
        )
        a = load_stage(start, ROW_STRIDE, group_stride, rows0, rows1, cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)
        acc0, acc1, squares = dot_stage(
            acc0, acc1, squares, b, x_ptr, gain_ptr, (stage + 1) * stage_cols,
            K, PARTS, PART_STRIDE, NORM, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        start += stage_cols * elem_bytes
        b = load_stage(
            start, ROW_STRIDE, group_stride, rows0, rows1, cols - stage_cols, WEIGHT, ALIGN, BLOCK_N, BLOCK_K
        )
    return (a, b), tl.sum(acc0, axis=1), tl.sum(acc1, axis=1), tl.sum(squares, axis=1)

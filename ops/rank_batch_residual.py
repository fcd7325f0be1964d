"""The residual stream of many tokens on several ranks: each adds up the parts of its own columns, and tells all ranks
what their next matrices need of the sum.

num tokens [1] read | parts [ranks, T, D / ranks] read | gain [D] of the next norm read
x [T, D / ranks] fp32 read and written: x += parts[0] + parts[1] + ..., in this order
xb [T, D] = x * gain pushed | squares [ranks * blocks, T] fp32 pushed: sums of x^2 over the columns of a block
An all-gather, the second half of an all-reduce whose first half is rank_batch_linear.py. What is gathered is rounded
already, half of what the parts are. One task = BLOCK_COLUMNS columns of BLOCK_TOKENS tokens, or nothing but a signal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import normed_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.scheduler.graph import Region, Task
from tri_mpk.scheduler.peers import push, signal_ranks, wait_for_ranks

BLOCK_COLUMNS = tl.constexpr(64)
BLOCK_TOKENS = tl.constexpr(64)


@triton.jit
def rank_batch_residual_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, parts_ptr, gain_ptr, x_ptr, xb_ptr, squares_ptr,  # in, in, in, in and out, out, out
    rank, block, first_token,
    D: tl.constexpr, WIDTH: tl.constexpr, MAX_TOKENS: tl.constexpr, IS_FIRST: tl.constexpr, SIZE: tl.constexpr,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    col = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    gain = tl.load(gain_ptr + rank * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    if first_token < num_tokens:
        token = first_token + tl.arange(0, BLOCK_TOKENS)
        is_token = token < num_tokens
        mask = is_token[:, None] & (col < WIDTH)[None, :]
        at = token[:, None] * WIDTH + col[None, :]
        x = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], tl.float32)
        if not IS_FIRST:
            x += tl.load(x_ptr + at, mask=mask, other=0.0)
        for sender in tl.static_range(RANKS):
            x += tl.load(parts_ptr + sender * (MAX_TOKENS * WIDTH) + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, x, mask=mask)
        xb = (x * gain[None, :]).to(xb_ptr.dtype.element_ty)
        push(task, xb_ptr + token[:, None] * D + (rank * WIDTH + col)[None, :], xb, mask, SIZE, RANKS, PORTABLE)
        squares_row_ptr = squares_ptr + (rank * ((WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS) + block) * MAX_TOKENS
        push(task, squares_row_ptr + token, tl.sum(x * x, axis=1), is_token, 4, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def num_blocks(width: int) -> int:
    """Rows of `squares` that a rank has, which adds up so many columns."""
    return -(-width // BLOCK_COLUMNS.value)


def cut_rank_batch_residual(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    parts: TensorHandle,
    gain: TensorHandle,
    residual: TensorHandle,
    normed: TensorHandle,
    squares: TensorHandle,
    rank: int,
    is_first: bool,
    grid_dim: int | None = None,
) -> Cut:
    if grid_dim is not None:
        raise ValueError(f"batch_residual has a task per block, got grid_dim={grid_dim}; leave grid_dim out")
    num_ranks, (max_tokens, width) = parts.dims[0], residual.dims
    cut = Cut(
        {
            "D": width * num_ranks, "WIDTH": width, "MAX_TOKENS": max_tokens, "IS_FIRST": is_first,
            "SIZE": normed.dtype.itemsize,
        },
        {
            "num_tokens_ptr": num_tokens, "parts_ptr": parts, "gain_ptr": gain, "x_ptr": residual,
            "xb_ptr": normed, "squares_ptr": squares,
        },
    )  # fmt: skip
    addresses = cut.addresses()
    tiles = [(first, block) for first in range(0, max_tokens, BLOCK_TOKENS.value) for block in range(num_blocks(width))]
    # What is pushed has no coordinates of its own: whoever reads it reads all.
    pushed = [even_ranges(tensor.dims[1], len(tiles)) for tensor in (normed, squares)]
    for (first_token, block), normed_part, squares_part in zip(tiles, *pushed, strict=True):
        lo, hi = block * BLOCK_COLUMNS.value, min(width, (block + 1) * BLOCK_COLUMNS.value)
        x = residual.box((first_token, min(max_tokens, first_token + BLOCK_TOKENS.value)), (lo, hi))
        cut.tasks.append(
            Task(
                op=0,
                tile=(len(cut.tasks),),
                reads=(num_tokens.whole(), parts.box((0, num_ranks), (lo, hi)), gain.whole())
                + (() if is_first else (x,)),
                writes=(x,),
                cost_bytes=4 * num_ranks * (hi - lo) * BLOCK_TOKENS.value,
                fields=addresses | {"rank": rank, "block": block, "first_token": first_token},
                pushes=(Region(normed.name, (normed_part,)), Region(squares.name, (squares_part,))),
                to_all_ranks=True,
            )
        )
    return cut


def rank_batch_residual_torch(
    residual: torch.Tensor, parts: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, xb, and the sums of squares [T], of a rank's columns."""
    x = residual.float() + parts.float().sum(0)
    return (x, *normed_torch(x, gain, gain.dtype))


RANK_BATCH_RESIDUAL = Op(
    "batch_residual", rank_batch_residual_tile, cut_rank_batch_residual, rank_batch_residual_torch, waits_for_ranks=True
)

"""The output projection of this rank's heads: its part of y = W @ merge(parts) (+ bias) goes to all ranks.

parts [S, H of this rank, Dh], lse [S, H of this rank] fp32 read | W [N, H of this rank * Dh] read | bias [N] read
y [ranks, N] pushed
merge as in attention_output.py. A bias belongs to one rank; the others have zeros. One task = consecutive rows.
Source: arXiv:1909.08053, figure 3; 2311.01282.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.attention import active_splits
from tri_mpk.ops.attention_output import attention_output_torch, cut_attention_output, load_merged, merged_columns
from tri_mpk.ops.gemv import dot_rows, prefetch_rows
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import push_to_all
from tri_mpk.ops.rank_linear import without_residual
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def rank_attention_output_tile(
    task, event_ptr, control_ptr, epoch, step, ring,
    parts_ptr, lse_ptr, weight_addr, bias_ptr, y_ptr,  # in, in, in, in, out
    row_of_rank, row0, num_rows,
    K: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SIZE: tl.constexpr, SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, PREFETCH: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    num_splits = active_splits(step, NUM_SPLITS, SPLIT_TOKENS)
    prefetch_rows(task, event_ptr, epoch, ring, PORTABLE, RING, PREFETCH)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = load_merged(parts_ptr, lse_ptr, num_splits, K, DH, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        if RING:
            ring, y = dot_rows(
                ring, x, lse_ptr, lse_ptr, weight_addr, block, num_rows,
                K, False, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            first = tl.cast(block, tl.int64) * BLOCK_N
            weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
            y = tl.zeros([BLOCK_N], tl.float32)
            for col in tl.range(0, K, BLOCK_K, num_stages=1):
                cols = col + tl.arange(0, BLOCK_K)
                mask = (row < num_rows)[:, None] & (cols < K)[None, :]
                w = tl.load(weight_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                merged = merged_columns(parts_ptr, lse_ptr, num_splits, cols, K, DH)
                y += tl.sum(w * merged[None, :], axis=1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        push(task, y_ptr + row_of_rank + row0 + row, y, row < num_rows, SIZE, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)
    return ring


def cut_rank_attention_output(machine: Machine, *, output: TensorHandle, rank: int, **others: object) -> Cut:
    cut = cut_attention_output(machine, residual=output, output=output, **others)
    return push_to_all(without_residual(cut, output, rank), output)


def rank_attention_output_torch(
    parts: torch.Tensor, lse: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return attention_output_torch(parts, lse, weight, torch.zeros(weight.shape[0]), bias)


RANK_ATTENTION_OUTPUT = Op(
    "attention_output", rank_attention_output_tile, cut_rank_attention_output, rank_attention_output_torch
)

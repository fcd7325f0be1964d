"""RMSNorm and a linear layer of a vector that comes in parts: y = W @ (x_hat * gain) + bias, x = residual + parts.

residual [D] fp32 read | parts [ranks, D] read | gain [D] read | W [N, D] read | bias [N] read
total [D] fp32 written | y [N] written
Else as in rmsnorm_linear.py. Source: arXiv:1909.08053, figure 3: columns of W^T are shared out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import load_segment, scale_segment
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import dot_rows_of_sum, inverse_rms_of_sum, load_kept, load_sum, read_sum, store_kept
from tri_mpk.ops.rmsnorm_linear import cut_rmsnorm_linear, rmsnorm_linear_torch
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.peers import wait_for_ranks


@triton.jit
def rank_rmsnorm_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, parts_ptr, gain_ptr, weight_addr, bias_ptr, total_ptr, y_ptr,  # in, in, in, in, in, out, out
    row0, num_rows, first_kept, num_kept,
    D: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr, KEPT: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    kept = load_kept(x_ptr, parts_ptr, first_kept, num_kept, D, KEPT, RANKS)
    x = scale_segment(ring, load_sum(x_ptr, parts_ptr, D, SLOT_ROWS, RANKS, RING), gain, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        ring, y = dot_rows_of_sum(
            ring, x, x_ptr, parts_ptr, gain_ptr, weight_addr, block, num_rows,
            D, SLOT_ROWS, RANKS, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y *= inverse_rms_of_sum(ring, x_ptr, parts_ptr, D, EPS, SLOT_ROWS, RANKS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        tl.store(y_ptr + row0 + row, y.to(y_ptr.dtype.element_ty), mask=row < num_rows)
    store_kept(total_ptr, kept, first_kept, num_kept, KEPT)
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_rank_rmsnorm_linear(
    machine: Machine, *, input: TensorHandle, parts: TensorHandle, total: TensorHandle, **others: object
) -> Cut:
    return read_sum(cut_rmsnorm_linear(machine, input=input, **others), input, parts, total)


def rank_rmsnorm_linear_torch(
    residual: torch.Tensor,
    parts: torch.Tensor,
    gain: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return rmsnorm_linear_torch(residual.float() + parts.float().sum(0), gain, weight, bias, eps)


RANK_RMSNORM_LINEAR = Op(
    "rmsnorm_linear", rank_rmsnorm_linear_tile, cut_rank_rmsnorm_linear, rank_rmsnorm_linear_torch, waits_for_ranks=True
)

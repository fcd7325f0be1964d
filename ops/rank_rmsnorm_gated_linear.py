"""RMSNorm and a gated linear layer of a vector that comes in parts: h = silu(gate) * up, x = residual + parts.

residual [D] fp32 read | parts [ranks, D] read | gain [D] read | W_gate, W_up [N, D] read
total [D] fp32 written | h [N] written
Else as in rmsnorm_gated_linear.py. Source: arXiv:2002.05202, 1909.08053.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import end_rows, load_segment, scale_segment, stream_rows
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import inverse_rms_of_sum, load_kept, load_sum, read_sum, row_sums_of_sum, store_kept
from tri_mpk.ops.rmsnorm_gated_linear import cut_rmsnorm_gated_linear, rmsnorm_gated_linear_torch
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.peers import wait_for_ranks


@triton.jit
def rank_rmsnorm_gated_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, parts_ptr, gain_ptr, gate_addr, up_addr, total_ptr, h_ptr,  # in, in, in, in, in, out, out
    row0, num_rows, first_kept, num_kept,
    D: tl.constexpr, EPS: tl.constexpr, KEPT: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    kept = load_kept(x_ptr, parts_ptr, first_kept, num_kept, D, KEPT, RANKS)
    x = scale_segment(ring, load_sum(x_ptr, parts_ptr, D, SLOT_ROWS, RANKS, RING), gain, SLOT_ROWS, RING)
    ring = stream_rows(ring, x, 0, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    ring = stream_rows(ring, x, BLOCK_N, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):  # with a ring, one block
        gate = row_sums_of_sum(
            ring, 0, x_ptr, parts_ptr, gain_ptr, gate_addr, block, num_rows,
            D, SLOT_ROWS, RANKS, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        up = row_sums_of_sum(
            ring, BLOCK_N, x_ptr, parts_ptr, gain_ptr, up_addr, block, num_rows,
            D, SLOT_ROWS, RANKS, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rstd = inverse_rms_of_sum(ring, x_ptr, parts_ptr, D, EPS, SLOT_ROWS, RANKS, RING, BLOCK_K)
        gate *= rstd
        h = gate / (1.0 + tl.exp(-gate)) * (up * rstd)
        row = block * BLOCK_N + rows
        tl.store(h_ptr + row0 + row, h.to(h_ptr.dtype.element_ty), mask=row < num_rows)
    store_kept(total_ptr, kept, first_kept, num_kept, KEPT)
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_rank_rmsnorm_gated_linear(
    machine: Machine, *, input: TensorHandle, parts: TensorHandle, total: TensorHandle, **others: object
) -> Cut:
    return read_sum(cut_rmsnorm_gated_linear(machine, input=input, **others), input, parts, total)


def rank_rmsnorm_gated_linear_torch(
    residual: torch.Tensor,
    parts: torch.Tensor,
    gain: torch.Tensor,
    weight_gate: torch.Tensor,
    weight_up: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    return rmsnorm_gated_linear_torch(residual.float() + parts.float().sum(0), gain, weight_gate, weight_up, eps)


RANK_RMSNORM_GATED_LINEAR = Op(
    "rmsnorm_gated_linear",
    rank_rmsnorm_gated_linear_tile,
    cut_rank_rmsnorm_gated_linear,
    rank_rmsnorm_gated_linear_torch,
    waits_for_ranks=True,
)

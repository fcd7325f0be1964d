"""RMSNorm and a gated linear layer: h = silu(gate) * up, gate = W_gate @ x_norm, up = W_up @ x_norm.

x [D] fp32 read | gain [D] read | W_gate, W_up [N, D] read | h [N] written | arithmetic in fp32
One task = the same consecutive rows of both matrices, so that a worker has both halves of its h.
Source: arXiv:2002.05202 (SwiGLU); transformers LlamaMLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import (
    block_rows,
    end_rows,
    inverse_rms,
    load_segment,
    row_sums,
    scale_segment,
    slot_rows,
    stream_rows,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import rmsnorm_torch
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task, WeightStream


@triton.jit
def rmsnorm_gated_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, gain_ptr, gate_addr, up_addr, h_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    ring = stream_rows(ring, x, 0, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    ring = stream_rows(ring, x, BLOCK_N, num_rows, D, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):  # with a ring, one block
        gate = row_sums(
            ring, 0, x_ptr, gain_ptr, gate_addr, block, num_rows, D, True, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
        )
        up = row_sums(
            ring, BLOCK_N, x_ptr, gain_ptr, up_addr, block, num_rows, D, True, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
        )
        rstd = inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        gate *= rstd
        h = gate / (1.0 + tl.exp(-gate)) * (up * rstd)
        row = block * BLOCK_N + rows
        tl.store(h_ptr + row0 + row, h.to(h_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_rmsnorm_gated_linear(
    machine: Machine,
    *,
    input: TensorHandle,
    weight_norm: TensorHandle,
    weight_gate: TensorHandle,
    weight_up: TensorHandle,
    output: TensorHandle,
    eps: float,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, hidden_size = weight_gate.dims
    num_tasks = min(num_rows, grid_dim or machine.num_workers)
    if machine.ring:  # a task is one block
        rounds = -(-num_rows // (num_tasks * block_rows(machine, matrices=2)))
        num_tasks = min(num_rows, num_tasks * rounds)
    rows_at_once = slot_rows(hidden_size, machine, -(-num_rows // num_tasks), matrices=2)
    cut = Cut(
        {
            "D": hidden_size,
            "EPS": eps,
            "SLOT_ROWS": rows_at_once,
            "BLOCK_N": block_rows(machine, matrices=2),
        },
        {"x_ptr": input, "gain_ptr": weight_norm, "h_ptr": output},
    )
    whole, addresses = (input.whole(), weight_norm.whole()), cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        start, other = Address(weight_gate.name, lo * hidden_size), Address(weight_up.name, lo * hidden_size)
        span = (lo * hidden_size, hi * hidden_size)
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight_gate.span(*span), weight_up.span(*span)),
                writes=(output.span(lo, hi),),
                cost_bytes=2 * (hi - lo) * hidden_size * weight_gate.dtype.itemsize,
                fields=addresses | {"gate_addr": start, "up_addr": other, "row0": lo, "num_rows": hi - lo},
                stream=WeightStream(start, hi - lo, hidden_size, rows_at_once, second=other),
            )
        )
    return cut


def rmsnorm_gated_linear_torch(
    x: torch.Tensor, gain: torch.Tensor, weight_gate: torch.Tensor, weight_up: torch.Tensor, eps: float
) -> torch.Tensor:
    x = rmsnorm_torch(x, gain, eps)
    return torch.nn.functional.silu(weight_gate.float() @ x) * (weight_up.float() @ x)


RMSNORM_GATED_LINEAR = Op(
    "rmsnorm_gated_linear", rmsnorm_gated_linear_tile, cut_rmsnorm_gated_linear, rmsnorm_gated_linear_torch
)

"""RMSNorm and a gated linear layer: h = silu(gate) * up, gate = W_gate @ x_norm, up = W_up @ x_norm.

x [D] fp32 in parts read | gain [D] read | W_gate, W_up [N, D] read | h [N] written | arithmetic in fp32
Row group 0 of a stage is rows of W_gate, row group 1 the same rows of W_up, so that a worker has both halves of its h.
One task = consecutive rows of both. Source: arXiv:2002.05202 (SwiGLU); transformers LlamaMLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import dot_row_block, stage_activations, staged_bytes
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import rmsnorm_torch
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task, WeightStream


@triton.jit
def rmsnorm_gated_linear_tile(
    task_ptr, event_ptr, control_ptr, epoch, ring,
    x_ptr, gain_ptr, gate_addr, up_addr, h_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    squares = stage_activations(ring, x_ptr, gain_ptr, D, PARTS, D, True, RING, BLOCK_N, BLOCK_K)
    rstd = tl.rsqrt(squares / D + EPS)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        ring, gate, up = dot_row_block(
            ring, x_ptr, gain_ptr, gate_addr, up_addr - gate_addr, block, num_rows,
            D, D, 0, PARTS, D, True, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        gate *= rstd
        h = gate / (1.0 + tl.exp(-gate)) * (up * rstd)
        row = block * BLOCK_N + rows
        tl.store(h_ptr + row0 + row, h.to(h_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task_ptr, event_ptr, PORTABLE)
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
    cut = Cut(
        {"D": hidden_size, "PARTS": input.parts, "EPS": eps},
        {"x_ptr": input, "gain_ptr": weight_norm, "h_ptr": output},
    )
    num_tasks = min(num_rows, grid_dim or machine.num_workers)
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        start, other = Address(weight_gate.name, lo * hidden_size), Address(weight_up.name, lo * hidden_size)
        span = (lo * hidden_size, hi * hidden_size)
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(input.whole(), weight_norm.whole(), weight_gate.span(*span), weight_up.span(*span)),
                writes=(output.span(lo, hi),),
                cost_bytes=2 * (hi - lo) * hidden_size * weight_gate.dtype.itemsize,
                fields={
                    "x_ptr": Address(input.name),
                    "gain_ptr": Address(weight_norm.name),
                    "gate_addr": start,
                    "up_addr": other,
                    "h_ptr": Address(output.name),
                    "row0": lo,
                    "num_rows": hi - lo,
                },
                stream=WeightStream(start, hidden_size, other, hi - lo, hi - lo, hidden_size, machine.block_n),
            )
        )
    cut.activation_bytes = staged_bytes(hidden_size, input.dtype, norm=True)
    return cut


def rmsnorm_gated_linear_torch(
    x: torch.Tensor, gain: torch.Tensor, weight_gate: torch.Tensor, weight_up: torch.Tensor, eps: float
) -> torch.Tensor:
    x = rmsnorm_torch(x, gain, eps)
    return torch.nn.functional.silu(weight_gate.float() @ x) * (weight_up.float() @ x)


RMSNORM_GATED_LINEAR = Op(
    "rmsnorm_gated_linear", rmsnorm_gated_linear_tile, cut_rmsnorm_gated_linear, rmsnorm_gated_linear_torch
)

"""RMSNorm and a linear layer: y = W @ (x_hat * gain) + bias, x_hat = x * rsqrt(mean(x^2) + eps).

x [D] fp32 read | gain [D] read | W [N, D] read | bias [N] read | y [N] written | arithmetic in fp32
The norm is one scalar at the end of the dot product: y = rsqrt(mean(x^2) + eps) * (W @ (gain * x)).
One task = consecutive rows = their share of the bytes of W.
Source: arXiv:1910.07467; transformers Qwen3RMSNorm, nn.Linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import (
    block_rows,
    dot_rows,
    inverse_rms,
    load_segment,
    scale_segment,
    slot_rows,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task, WeightStream


@triton.jit
def rmsnorm_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, gain_ptr, weight_addr, bias_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            gain_ptr,
            weight_addr,
            block,
            num_rows,
            D,
            True,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        y *= inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        tl.store(y_ptr + row0 + row, y.to(y_ptr.dtype.element_ty), mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


def linear_stream(weight: TensorHandle, lo: int, hi: int, rows_at_once: int) -> WeightStream:
    """Rows lo to hi of a matrix [N, K]."""
    cols = weight.dims[1]
    return WeightStream(Address(weight.name, lo * cols), hi - lo, cols, rows_at_once)


def cut_rmsnorm_linear(
    machine: Machine,
    *,
    input: TensorHandle,
    weight_norm: TensorHandle,
    weight_linear: TensorHandle,
    output: TensorHandle,
    bias: TensorHandle | None = None,
    eps: float,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, hidden_size = weight_linear.dims
    num_tasks = min(num_rows, grid_dim or machine.num_workers)
    rows_at_once = slot_rows(hidden_size, machine, -(-num_rows // num_tasks))
    cut = Cut(
        {
            "D": hidden_size,
            "EPS": eps,
            "HAS_BIAS": bias is not None,
            "SLOT_ROWS": rows_at_once,
            "BLOCK_N": block_rows(machine),
        },
        {"x_ptr": input, "gain_ptr": weight_norm, "bias_ptr": bias or weight_norm, "y_ptr": output},
    )
    whole, addresses = (input.whole(), weight_norm.whole()), cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        stream = linear_stream(weight_linear, lo, hi, rows_at_once)
        reads = (*whole, weight_linear.span(lo * hidden_size, hi * hidden_size))
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads + ((bias.span(lo, hi),) if bias else ()),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * hidden_size * weight_linear.dtype.itemsize,
                fields=addresses | {"weight_addr": stream.start, "row0": lo, "num_rows": hi - lo},
                stream=stream,
            )
        )
    return cut


def rmsnorm_torch(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain.float()


def rmsnorm_linear_torch(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    y = weight.float() @ rmsnorm_torch(x, gain, eps)
    return y if bias is None else y + bias.float()


RMSNORM_LINEAR = Op("rmsnorm_linear", rmsnorm_linear_tile, cut_rmsnorm_linear, rmsnorm_linear_torch)

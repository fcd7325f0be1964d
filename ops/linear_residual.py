"""A linear layer and the residual stream: y = residual + W @ x (+ bias).

x [K] read | W [N, K] read | bias [N] read | residual [N] fp32 read | y [N] fp32 written
One task = consecutive rows. Source: transformers LlamaDecoderLayer, nn.Linear; fp32 residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import (
    block_rows,
    dot_rows,
    load_segment,
    slot_rows,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import linear_stream
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def linear_residual_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = load_segment(x_ptr, K, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        base = tl.load(residual_ptr + row0 + row, mask=row < num_rows, other=0.0)
        if HAS_BIAS:
            base += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            x_ptr,
            weight_addr,
            block,
            num_rows,
            K,
            False,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        tl.store(y_ptr + row0 + row, base + y, mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_linear_residual(
    machine: Machine,
    *,
    input: TensorHandle,
    weight: TensorHandle,
    residual: TensorHandle,
    output: TensorHandle,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, k = weight.dims
    num_tasks = min(num_rows, grid_dim or machine.num_workers)
    rows_at_once = slot_rows(k, machine, -(-num_rows // num_tasks))
    cut = Cut(
        {
            "K": k,
            "HAS_BIAS": bias is not None,
            "SLOT_ROWS": rows_at_once,
            "BLOCK_N": block_rows(machine),
        },
        {"x_ptr": input, "bias_ptr": bias or input, "residual_ptr": residual, "y_ptr": output},
    )
    whole, addresses = input.whole(), cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        stream = linear_stream(weight, lo, hi, rows_at_once)
        reads = (whole, weight.span(lo * k, hi * k), residual.span(lo, hi))
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads + ((bias.span(lo, hi),) if bias else ()),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"weight_addr": stream.start, "row0": lo, "num_rows": hi - lo},
                stream=stream,
            )
        )
    return cut


def linear_residual_torch(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = residual.float() + weight.float() @ x.float()
    return y if bias is None else y + bias.float()


LINEAR_RESIDUAL = Op("linear_residual", linear_residual_tile, cut_linear_residual, linear_residual_torch)

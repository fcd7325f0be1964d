"""A linear layer and the residual stream: y = residual + W @ x (+ bias).

x [K] read | W [N, K] read | bias [N] read | residual [N] fp32 read | y [N] fp32 written | arithmetic in fp32
One task = consecutive rows. A stage holds two groups of BLOCK_N rows; where a worker gets no more than BLOCK_N rows, the
second group is the second half of their columns instead, so that as many bytes are in flight.
Source: transformers LlamaDecoderLayer, nn.Linear; fp32 residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import dot_row_block, load_next, load_next_words
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import linear_stream
from tri_mpk.scheduler.device import TASK_SIGNALS, signal, wait
from tri_mpk.scheduler.graph import Address, Task


@triton.jit
def linear_residual_tile(
    task, event_ptr, control_ptr, epoch, carry,
    x_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows,
    K: tl.constexpr, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    PORTABLE: tl.constexpr, WEIGHT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K_GROUP: tl.constexpr = K // SPLIT_K
    GROUP_COLS: tl.constexpr = K_GROUP if SPLIT_K == 2 else 0
    GROUP_ROWS: tl.constexpr = BLOCK_N if SPLIT_K == 1 else 0
    group_stride: tl.constexpr = (K_GROUP if SPLIT_K == 2 else BLOCK_N * K) * (WEIGHT.primitive_bitwidth // 8)
    signals = tl.load(task[0] + TASK_SIGNALS)
    next_words = load_next_words(task[0])
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for block in tl.range(0, (num_rows + BLOCK_N + GROUP_ROWS - 1) // (BLOCK_N + GROUP_ROWS), num_stages=1):
        row = block * (BLOCK_N + GROUP_ROWS) + tl.arange(0, BLOCK_N)
        mask0 = row < num_rows
        mask1 = row + GROUP_ROWS < num_rows
        base0 = tl.load(residual_ptr + row0 + row, mask=mask0, other=0.0)
        base1 = tl.load(residual_ptr + row0 + row + GROUP_ROWS, mask=mask1, other=0.0)
        if HAS_BIAS:
            base0 += tl.load(bias_ptr + row0 + row, mask=mask0, other=0.0).to(tl.float32)
            base1 += tl.load(bias_ptr + row0 + row + GROUP_ROWS, mask=mask1, other=0.0).to(tl.float32)
        carry, y0, y1, squares = dot_row_block(
            carry, x_ptr, x_ptr, weight_addr, group_stride, block, num_rows,
            K_GROUP, K, GROUP_ROWS, GROUP_COLS, False, WEIGHT, ALIGN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SPLIT_K == 2:
            tl.store(y_ptr + row0 + row, base0 + (y0 + y1), mask=mask0)
        else:
            tl.store(y_ptr + row0 + row, base0 + y0, mask=mask0)
            tl.store(y_ptr + row0 + row + BLOCK_N, base1 + y1, mask=mask1)
    signal(signals, event_ptr, PORTABLE)
    return load_next(next_words, WEIGHT, ALIGN, BLOCK_N, BLOCK_K)


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
    split_k = 2 if num_rows <= num_tasks * machine.block_n and k % (2 * machine.align) == 0 else 1
    cut = Cut(
        {"K": k, "SPLIT_K": split_k, "HAS_BIAS": bias is not None},
        {"x_ptr": input, "bias_ptr": bias or input, "residual_ptr": residual, "y_ptr": output},
    )
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        stream = linear_stream(weight, lo, hi, machine, split_k)
        reads = (input.whole(), residual.span(lo, hi), weight.span(lo * k, hi * k))
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads + ((bias.span(lo, hi),) if bias else ()),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields={
                    "x_ptr": Address(input.name),
                    "weight_addr": stream.start,
                    "bias_ptr": Address((bias or input).name),
                    "residual_ptr": Address(residual.name),
                    "y_ptr": Address(output.name),
                    "row0": lo,
                    "num_rows": hi - lo,
                },
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

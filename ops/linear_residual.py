"""A linear layer and the residual stream: y = residual + W @ x (+ bias).

x [K] read | W [N, K] read | bias [N] read | residual [N] fp32 in parts read | y [N] fp32 in parts written
Where N is too small to give every worker a full tile of rows, K is split: part 0 of y is the residual plus the first
part's dot products, every further part only its own; whoever reads y adds the parts up, always in the same order.
One task = consecutive rows of one part of K. Source: transformers LlamaDecoderLayer, nn.Linear; fp32 residual stream.

Three parts over four workers, 8 rows: the 24 (part, row) pairs are dealt out evenly, in this order.

    worker 0: part 0 rows 0-5 | worker 1: part 0 rows 6-7, part 1 rows 0-3 | worker 2: part 1 rows 4-7, part 2 rows 0-1
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import dot_row_block, stage_activations, staged_bytes
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import linear_stream
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task


@triton.jit
def linear_residual_tile(
    task_ptr, event_ptr, control_ptr, epoch, ring,
    x_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, out
    row0, num_rows, part,
    N: tl.constexpr, K_PART: tl.constexpr, ROW_STRIDE: tl.constexpr, RESIDUAL_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task_ptr, event_ptr, control_ptr, epoch, PORTABLE)
    stage_activations(ring, x_ptr + part * K_PART, x_ptr, K_PART, 1, 0, False, RING, BLOCK_N, BLOCK_K)
    for block in tl.range(0, (num_rows + 2 * BLOCK_N - 1) // (2 * BLOCK_N), num_stages=1):
        row = block * 2 * BLOCK_N + rows
        mask0 = row < num_rows
        mask1 = row + BLOCK_N < num_rows
        adds0 = mask0 & (part == 0)
        adds1 = mask1 & (part == 0)
        base0 = tl.zeros([BLOCK_N], tl.float32)
        base1 = tl.zeros([BLOCK_N], tl.float32)
        for residual_part in tl.static_range(RESIDUAL_PARTS):
            ptr = residual_ptr + residual_part * N + row0 + row
            base0 += tl.load(ptr, mask=adds0, other=0.0)
            base1 += tl.load(ptr + BLOCK_N, mask=adds1, other=0.0)
        if HAS_BIAS:
            base0 += tl.load(bias_ptr + row0 + row, mask=adds0, other=0.0).to(tl.float32)
            base1 += tl.load(bias_ptr + row0 + row + BLOCK_N, mask=adds1, other=0.0).to(tl.float32)
        ring, y0, y1 = dot_row_block(
            ring, x_ptr + part * K_PART, x_ptr,
            weight_addr, BLOCK_N * ROW_STRIDE * (WEIGHT.primitive_bitwidth // 8), block, num_rows,
            K_PART, ROW_STRIDE, BLOCK_N, 1, 0, False, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        ptr = y_ptr + part * N + row0 + row
        tl.store(ptr, base0 + y0, mask=mask0)
        tl.store(ptr + BLOCK_N, base1 + y1, mask=mask1)
    signal(task_ptr, event_ptr, PORTABLE)
    return ring


def choose_split_k(num_rows: int, k: int, machine: Machine) -> int:
    """As many parts as fill a worker's tile of rows, as long as a part keeps a whole stage of columns."""
    split_k = 1
    while (
        num_rows * split_k * 2 <= machine.num_workers * 2 * machine.block_n
        and k // (split_k * 2) >= 2 * machine.block_k
        and k % (split_k * 2 * machine.align) == 0
        and split_k < 8
    ):
        split_k *= 2
    return split_k


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
    output.parts = split_k = choose_split_k(num_rows, k, machine)
    k_part = k // split_k
    cut = Cut(
        {
            "N": num_rows,
            "K_PART": k_part,
            "ROW_STRIDE": k,
            "RESIDUAL_PARTS": residual.parts,
            "HAS_BIAS": bias is not None,
        },
        {"x_ptr": input, "bias_ptr": bias or input, "residual_ptr": residual, "y_ptr": output},
    )
    for lo, hi in even_ranges(num_rows * split_k, min(num_rows * split_k, grid_dim or machine.num_workers)):
        for part in range(lo // num_rows, -(-hi // num_rows)):
            row_lo = max(lo - part * num_rows, 0)
            row_hi = min(hi - part * num_rows, num_rows)
            stream = linear_stream(weight, row_lo, row_hi, machine, part * k_part, k_part)
            reads = [input.span(part * k_part, (part + 1) * k_part), weight.span(row_lo * k, row_hi * k)]
            if part == 0:
                reads += [residual.box((0, residual.parts), (row_lo, row_hi))]
                reads += [bias.span(row_lo, row_hi)] if bias else []
            cut.tasks.append(
                Task(
                    op=0,
                    tile=(part, row_lo),
                    reads=tuple(reads),
                    writes=(output.span(row_lo, row_hi, part),),
                    cost_bytes=(row_hi - row_lo) * k_part * weight.dtype.itemsize,
                    fields={
                        "x_ptr": Address(input.name),
                        "weight_addr": stream.start,
                        "bias_ptr": Address((bias or input).name),
                        "residual_ptr": Address(residual.name),
                        "y_ptr": Address(output.name),
                        "row0": row_lo,
                        "num_rows": row_hi - row_lo,
                        "part": part,
                    },
                    stream=stream,
                )
            )
    cut.activation_bytes = staged_bytes(k_part, input.dtype, norm=False)
    return cut


def linear_residual_torch(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = residual.float() + weight.float() @ x.float()
    return y if bias is None else y + bias.float()


LINEAR_RESIDUAL = Op("linear_residual", linear_residual_tile, cut_linear_residual, linear_residual_torch)

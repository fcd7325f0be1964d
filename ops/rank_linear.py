"""A linear layer whose columns are shared out: this rank's part of y = W @ x (+ bias) goes to all ranks.

x [K of this rank] read | W [N, K of this rank] read | bias [N] read | y [ranks, N] pushed
A bias belongs to one rank; the others have zeros. One task = consecutive rows. Source: arXiv:1909.08053, figure 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import dot_rows, load_segment
from tri_mpk.ops.linear_residual import cut_linear_residual
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import push_to_all
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def rank_linear_tile(
    task, event_ptr, control_ptr, epoch, ring,
    x_ptr, weight_addr, bias_ptr, y_ptr,  # in, in, in, out
    row_of_rank, row0, num_rows,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, SIZE: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = load_segment(x_ptr, K, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        ring, y = dot_rows(
            ring, x, x_ptr, x_ptr, weight_addr, block, num_rows,
            K, False, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        push(task, y_ptr + row_of_rank + row0 + row, y, row < num_rows, SIZE, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)
    return ring


def cut_rank_linear(
    machine: Machine,
    *,
    input: TensorHandle,
    weight: TensorHandle,
    output: TensorHandle,
    rank: int,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    cut = cut_linear_residual(
        machine, input=input, weight=weight, residual=output, output=output, bias=bias, grid_dim=grid_dim
    )
    return push_to_all(without_residual(cut, output, rank), output)


def without_residual(cut: Cut, output: TensorHandle, rank: int) -> Cut:
    """Of a cut that was made with the output in place of the residual."""
    del cut.pointers["residual_ptr"]
    cut.constants["SIZE"] = output.dtype.itemsize
    for task in cut.tasks:
        task.reads = tuple(region for region in task.reads if region.tensor != output.name)
        del task.fields["residual_ptr"]
        task.fields["row_of_rank"] = rank * output.dims[1]
    return cut


def rank_linear_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = weight.float() @ x.float()
    return y if bias is None else y + bias.float()


RANK_LINEAR = Op("linear", rank_linear_tile, cut_rank_linear, rank_linear_torch)

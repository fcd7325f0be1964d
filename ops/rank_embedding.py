"""The embedding row of the token to process, from a table whose rows are shared out: the rank that has it pushes it.

tokens [max_seq_len] int64 read | table [V of this rank, D] read | y [ranks, D] pushed
The other ranks push zeros, so that the row is the sum of the parts like any other vector. One task = up to 4096
columns. Source: torch.nn.functional.embedding; arXiv:1909.08053.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.embedding import cut_embedding
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import push_to_all
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def rank_embedding_tile(
    task, event_ptr, control_ptr, epoch, step,
    tokens_ptr, table_ptr, y_ptr,  # in, in, out
    row_of_rank, first_row, num_table_rows, col0, num_cols,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    row = tl.load(tokens_ptr + step) - first_row
    here = (row >= 0) & (row < num_table_rows)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    y = tl.load(table_ptr + row * D + col0 + cols, mask=mask & here, other=0.0)
    push(task, y_ptr + row_of_rank + col0 + cols, y.to(y_ptr.dtype.element_ty), mask, SIZE, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_rank_embedding(
    machine: Machine,
    *,
    tokens: TensorHandle,
    weight: TensorHandle,
    output: TensorHandle,
    rank: int,
    first_row: int,
    grid_dim: int | None = None,
) -> Cut:
    cut = cut_embedding(machine, tokens=tokens, weight=weight, output=output, grid_dim=grid_dim)
    del cut.constants["V"]  # ranks may have a row more or less and share a kernel all the same
    cut.constants["SIZE"] = output.dtype.itemsize
    for task in cut.tasks:
        task.fields |= {
            "row_of_rank": rank * output.dims[1], "first_row": first_row, "num_table_rows": weight.dims[0]
        }  # fmt: skip
    return push_to_all(cut, output)


def rank_embedding_torch(token: int, table: torch.Tensor, first_row: int) -> torch.Tensor:
    here = first_row <= token < first_row + len(table)
    return table[token - first_row].float() if here else torch.zeros(table.shape[1])


RANK_EMBEDDING = Op("embedding", rank_embedding_tile, cut_rank_embedding, rank_embedding_torch)

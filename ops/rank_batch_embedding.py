"""The embedding rows of the step's tokens, from a table whose rows are shared out: this rank's part of them.

num tokens [1], token ids [T] int32 read | table [V of this rank, D] read | parts [ranks, T, D / ranks] pushed
Tokens of other ranks' rows have zeros, so that the rows are sums of parts like those of rank_batch_linear.py, whose
columns are shared out in the same way. Source: torch.nn.functional.embedding; arXiv:1909.08053.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import SOME
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.ops.rank_batch_linear import shares
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import at_peer, signal_ranks


@triton.jit
def rank_batch_embedding_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, table_ptr, parts_ptr,  # in, in, in, out
    place, first_row, num_table_rows, col0, num_cols,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    cols = col0 + tl.arange(0, BLOCK_D)
    is_col = cols < col0 + num_cols
    there_ptr = at_peer(task, parts_ptr + place, 0, SIZE, PORTABLE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for first in tl.range(0, num_tokens, SOME, num_stages=1):
        token = first + tl.arange(0, SOME)
        is_token = token < num_tokens
        row = tl.load(token_ids_ptr + token, mask=is_token, other=0) - first_row
        here = is_token & (row >= 0) & (row < num_table_rows)
        at = table_ptr + row.to(tl.int64)[:, None] * D + cols[None, :]
        x = tl.load(at, mask=here[:, None] & is_col[None, :], other=0.0)
        at = there_ptr + token[:, None] * WIDTH + cols[None, :]
        tl.store(at, x.to(there_ptr.dtype.element_ty), mask=is_token[:, None] & is_col[None, :])
    signal_ranks(task, event_ptr, 1, PORTABLE)


def cut_rank_batch_embedding(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_ids: TensorHandle,
    weight: TensorHandle,
    parts: TensorHandle,
    rank: int,
    first_row: int,
    grid_dim: int | None = None,
) -> Cut:
    (num_table_rows, hidden_size), num_ranks = weight.dims, parts.dims[0]
    width = hidden_size // num_ranks
    each = list(shares(rank, parts, width, grid_dim or machine.num_workers))
    block_d = next_power_of_2(max(share.hi - share.lo for share in each))
    cut = Cut(
        {"D": hidden_size, "WIDTH": width, "BLOCK_D": block_d, "SIZE": parts.dtype.itemsize},
        {"num_tokens_ptr": num_tokens, "token_ids_ptr": token_ids, "table_ptr": weight, "parts_ptr": parts},
    )
    fields = cut.addresses() | {"first_row": first_row, "num_table_rows": num_table_rows}
    for i, (ahead, lo, hi, place, pushed) in enumerate(each):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(num_tokens.whole(), token_ids.whole(), weight.whole()),
                writes=(),
                cost_bytes=(hi - lo) * token_ids.numel * weight.dtype.itemsize,
                fields=fields | {"place": place, "col0": lo, "num_cols": hi - lo},
                pushes=(pushed,),
                ahead=ahead,
            )
        )
    return cut


def rank_batch_embedding_torch(token_ids: torch.Tensor, table: torch.Tensor, first_row: int) -> torch.Tensor:
    """This rank's part of all columns [T, D]."""
    row = token_ids.long() - first_row
    here = (row >= 0) & (row < len(table))
    return torch.where(here[:, None], table[row.clamp(0, len(table) - 1)].float(), 0.0)


RANK_BATCH_EMBEDDING = Op(
    "batch_embedding_parts", rank_batch_embedding_tile, cut_rank_batch_embedding, rank_batch_embedding_torch
)

"""The embedding rows of the step's tokens, and what the first norm's matrix needs of them.

token ids [T] int32 read | table [V, D] read | gain [D] read
x [T, D] fp32, xb [T, D] = x * gain, squares [num_tasks, T] fp32 written
One task = consecutive columns of all tokens, cut like those of batch_linear_residual, which write the same tensors.
Source: torch.nn.functional.embedding; for xb and squares see batch_linear_residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_gemm import SOME, normed_torch, store_residual
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def batch_embedding_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, token_ids_ptr, table_ptr, gain_ptr, x_ptr, xb_ptr, squares_ptr,  # in, in, in, in, out, out, out
    part, col0, num_cols,
    V: tl.constexpr, D: tl.constexpr, MAX_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_tokens = tl.load(num_tokens_ptr)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    cols = tl.arange(0, BLOCK_D)
    for first in tl.range(0, num_tokens, SOME, num_stages=1):
        token = first + tl.arange(0, SOME)
        is_token = token < num_tokens
        id = tl.load(token_ids_ptr + token, mask=is_token, other=0)
        id = tl.minimum(tl.maximum(id, 0), V - 1).to(tl.int64)  # after an abort anything may stand there
        mask = (cols < num_cols)[:, None] & is_token[None, :]
        x = tl.load(table_ptr + id[None, :] * D + (col0 + cols)[:, None], mask=mask, other=0.0).to(tl.float32)
        square = store_residual(x, x_ptr, xb_ptr, gain_ptr, col0 + cols, cols < num_cols, token, is_token, D)
        tl.store(squares_ptr + part * MAX_TOKENS + token, square.to(tl.float32), mask=is_token)
    signal(task, event_ptr, PORTABLE)


def cut_batch_embedding(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_ids: TensorHandle,
    weight: TensorHandle,
    gain: TensorHandle,
    output: TensorHandle,
    normed: TensorHandle,
    squares: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    vocab_size, hidden_size = weight.dims
    num_parts, max_tokens = squares.dims
    block_d = next_power_of_2(-(-hidden_size // num_parts))
    pointers = {
        "num_tokens_ptr": num_tokens, "token_ids_ptr": token_ids, "table_ptr": weight, "gain_ptr": gain,
        "x_ptr": output, "xb_ptr": normed, "squares_ptr": squares,
    }  # fmt: skip
    cut = Cut({"V": vocab_size, "D": hidden_size, "MAX_TOKENS": max_tokens, "BLOCK_D": block_d}, pointers)
    reads = (num_tokens.whole(), token_ids.whole(), weight.whole(), gain.whole())
    addresses = cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(hidden_size, num_parts)):
        own = (output.columns(lo, hi), normed.columns(lo, hi), squares.box((i, i + 1), (0, max_tokens)))
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads,
                writes=own,
                cost_bytes=(hi - lo) * max_tokens * weight.dtype.itemsize,
                fields=addresses | {"part": i, "col0": lo, "num_cols": hi - lo},
            )
        )
    return cut


def batch_embedding_torch(
    token_ids: torch.Tensor, table: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, xb, and the sums of squares [T]."""
    x = table[token_ids].float()
    return (x, *normed_torch(x, gain, table.dtype))


BATCH_EMBEDDING = Op("batch_embedding", batch_embedding_tile, cut_batch_embedding, batch_embedding_torch)

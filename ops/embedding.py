"""The embedding row of the token to process: y = table[tokens[step]].

tokens [max_seq_len] int64 read | table [V, D] read | y [D] fp32 written
One task = up to 4096 columns. Source: torch.nn.functional.embedding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task


@triton.jit
def embedding_tile(
    task, event_ptr, control_ptr, epoch, step,
    tokens_ptr, table_ptr, y_ptr,  # in, in, out
    col0, num_cols,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    token = tl.load(tokens_ptr + step)
    token = tl.minimum(tl.maximum(token, 0), V - 1)  # after an abort anything may stand there
    cols = tl.arange(0, BLOCK_D)
    mask = cols < num_cols
    y = tl.load(table_ptr + token * D + col0 + cols, mask=mask, other=0.0)
    tl.store(y_ptr + col0 + cols, y.to(y_ptr.dtype.element_ty), mask=mask)
    signal(task, event_ptr, PORTABLE)


def cut_embedding(
    machine: Machine,
    *,
    tokens: TensorHandle,
    weight: TensorHandle,
    output: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    vocab_size, hidden_size = weight.dims
    num_tasks = grid_dim or -(-hidden_size // 4096)
    block_d = next_power_of_2(-(-hidden_size // num_tasks))
    cut = Cut(
        {"V": vocab_size, "D": hidden_size, "BLOCK_D": block_d},
        {"tokens_ptr": tokens, "table_ptr": weight, "y_ptr": output},
    )
    for i, (lo, hi) in enumerate(even_ranges(hidden_size, num_tasks)):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(tokens.whole(), weight.whole()),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * weight.dtype.itemsize,
                fields={
                    "tokens_ptr": Address(tokens.name),
                    "table_ptr": Address(weight.name),
                    "y_ptr": Address(output.name),
                    "col0": lo,
                    "num_cols": hi - lo,
                },
            )
        )
    return cut


def embedding_torch(token: int, table: torch.Tensor) -> torch.Tensor:
    return table[token].float()


EMBEDDING = Op("embedding", embedding_tile, cut_embedding, embedding_torch)

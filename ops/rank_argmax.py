"""The second half of argmax on several ranks: each finds the same token among what all of them have pushed.

best value, index [ranks, num_parts] read | asked [ranks] int32 read | tokens [max_seq_len] int64 written
step [1] int32 written
All ranks read the same numbers, so they agree on the token and on whether the step was the last one. The end of a step
is signalled to all ranks: none begins the next one before all are done. Else as in argmax.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.argmax import best_of_parts, finish_step
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.scheduler.device import (
    CONTROL_EOS,
    CONTROL_LAST_STEP,
    CONTROL_NUM_EOS,
    CONTROL_NUM_KNOWN,
)
from tri_mpk.scheduler.graph import Address, Task
from tri_mpk.scheduler.peers import signal_ranks, wait_for_ranks


@triton.jit
def is_last_step(step, last_step, asked_ptr, ASKED_STRIDE: tl.constexpr, RANKS: tl.constexpr):
    """Whether the launch ends with this step, or a host of any rank has asked for that."""
    stop = step >= last_step
    for rank in tl.static_range(RANKS):
        stop = stop | (tl.load(asked_ptr + rank * ASKED_STRIDE) != 0)
    return stop


@triton.jit
def rank_argmax_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch, step, step_ptr,
    best_value_ptr, best_index_ptr, asked_ptr, tokens_ptr,  # in, in, in, out
    NUM_PARTS: tl.constexpr, ASKED_STRIDE: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    token = best_of_parts(best_value_ptr, best_index_ptr, NUM_PARTS)
    stop = is_last_step(step, last_step, asked_ptr, ASKED_STRIDE, RANKS)
    finish_step(
        control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop, PORTABLE
    )
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_rank_argmax(
    machine: Machine,
    *,
    best_value: TensorHandle,
    best_index: TensorHandle,
    asked: TensorHandle,
    tokens: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    check_grid("argmax", grid_dim, 1, "one task")
    tensors = {
        "best_value_ptr": best_value, "best_index_ptr": best_index, "asked_ptr": asked, "tokens_ptr": tokens
    }  # fmt: skip
    num_ranks, parts_per_rank = best_value.dims
    whole = ((0, num_ranks), (0, parts_per_rank))
    num_parts = best_value.numel
    task = Task(
        op=0,
        tile=(0,),
        reads=(best_value.box(*whole), best_index.box(*whole), asked.box((0, num_ranks), (0, 1))),
        writes=(tokens.whole(),),
        cost_bytes=8 * num_parts,
        fields={name: Address(tensor.name) for name, tensor in tensors.items()},
        to_all_ranks=True,
    )
    constants = {"NUM_PARTS": num_parts, "ASKED_STRIDE": asked.dims[1]}
    return Cut(constants, tensors, [task])


def rank_argmax_torch(logits: torch.Tensor) -> torch.Tensor:
    """Logits of all ranks, one after another."""
    return logits.argmax(-1)


RANK_ARGMAX = Op("argmax", rank_argmax_tile, cut_rank_argmax, rank_argmax_torch, waits_for_ranks=True, ends_step=True)

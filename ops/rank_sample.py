"""The end of a decode step on several ranks: each chooses the same token from the logits of all of them.

best value, index [ranks, num_parts] read | all logits [ranks, W] fp32 read | asked [ranks] int32 read
seen [V] int8 read and written | tokens [max_seq_len] int64 written | logprobs [max_seq_len] fp32 written
step [1] int32 written | scratch
All ranks compute the same from the same numbers, so they agree on the token and on whether the step was the last one.
The end of a step is signalled to all ranks: none begins the next one before all are done. Else as in sample.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.argmax import finish_step
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.rank_argmax import is_last_step
from tri_mpk.ops.sample import cut_sample, next_token, sample_torch
from tri_mpk.scheduler.device import (
    CONTROL_CHOICE,
    CONTROL_EOS,
    CONTROL_LAST_STEP,
    CONTROL_NUM_EOS,
    CONTROL_NUM_KNOWN,
)
from tri_mpk.scheduler.graph import Address, Region
from tri_mpk.scheduler.peers import signal_ranks, wait_for_ranks


@triton.jit(noinline=True)  # as sample_tile is
def rank_sample_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch, step, step_ptr,
    best_value_ptr, best_index_ptr, all_logits_ptr, asked_ptr,  # in
    tokens_ptr, logprobs_ptr, seen_ptr, scores_ptr, scratch_ptr, indices_ptr,  # out, out, in and out
    NUM_PARTS: tl.constexpr, V: tl.constexpr, TURN: tl.constexpr, ASKED_STRIDE: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    eos = tl.load(control_ptr + CONTROL_EOS + tl.arange(0, 32))
    is_eos_id = tl.arange(0, 32) < tl.load(control_ptr + CONTROL_NUM_EOS)
    num_known = tl.load(control_ptr + CONTROL_NUM_KNOWN).to(tl.int32)
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP).to(tl.int32)
    choice = tl.load(control_ptr + CONTROL_CHOICE).to(tl.int32)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    token = next_token(
        control_ptr, choice, all_logits_ptr, step + 1, step + 1 < num_known, best_value_ptr, best_index_ptr,
        logprobs_ptr, seen_ptr, scores_ptr, scratch_ptr, indices_ptr, NUM_PARTS, V, TURN, PORTABLE,
    )  # fmt: skip
    stop = is_last_step(step, last_step, asked_ptr, ASKED_STRIDE, RANKS)
    finish_step(
        control_ptr, mailbox_ptr, epoch, step, step_ptr, tokens_ptr, token, num_known, eos, is_eos_id, stop, PORTABLE
    )
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_rank_sample(
    machine: Machine,
    *,
    best_value: TensorHandle,
    best_index: TensorHandle,
    all_logits: TensorHandle,
    asked: TensorHandle,
    **others: TensorHandle | int | None,
) -> Cut:
    cut = cut_sample(machine, best_value=best_value, best_index=best_index, **others)
    cut.pointers |= {"all_logits_ptr": all_logits, "asked_ptr": asked}
    cut.constants["ASKED_STRIDE"] = asked.dims[1]
    num_ranks, num_parts = best_value.dims
    pushed = {best_value.name: num_parts, best_index.name: num_parts, all_logits.name: num_parts, asked.name: 1}
    for task in cut.tasks:
        task.reads = tuple(region for region in task.reads if region.tensor not in pushed)
        task.reads += tuple(Region(name, ((0, num_ranks), (0, size))) for name, size in pushed.items())
        task.fields |= {"all_logits_ptr": Address(all_logits.name), "asked_ptr": Address(asked.name)}
        task.to_all_ranks = True
    return cut


def rank_sample_torch(logits: torch.Tensor, previous: torch.Tensor, **parameters: float) -> torch.Tensor:
    """Probabilities of the next token, from the logits of all ranks, one after another."""
    return sample_torch(logits.reshape(-1), previous, **parameters)


RANK_SAMPLE = Op("sample", rank_sample_tile, cut_rank_sample, rank_sample_torch, waits_for_ranks=True, ends_step=True)

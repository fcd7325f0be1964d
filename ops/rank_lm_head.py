"""Final RMSNorm of a vector that comes in parts, this rank's rows of the language model head, the first half of argmax.

residual [D] fp32 read | parts [ranks, D] read | gain [D] read | W [V of this rank, D] read
logits [V of this rank] fp32 written | best value, index [ranks, num_tasks] pushed | all logits [ranks, most V] pushed
Indices are those of the whole vocabulary. In launches that need logits to choose tokens, all ranks get those of all,
one rank's behind another's. Else as in lm_head.py. Source: transformers LlamaForCausalLM.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import load_segment, scale_segment, skip_rows
from tri_mpk.ops.lm_head import best_of_block, cut_lm_head, lm_head_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.ops.parts import dot_rows_of_sum, inverse_rms_of_sum, load_sum, push_to_all, read_sum
from tri_mpk.ops.sample import CHOOSE_BEST
from tri_mpk.scheduler.device import CONTROL_CHOICE, CONTROL_LOGITS_FROM, CONTROL_LOGITS_STRIDE
from tri_mpk.scheduler.graph import Address
from tri_mpk.scheduler.peers import push, signal_ranks, wait_for_ranks


@triton.jit
def rank_lm_head_tile(
    task, event_ptr, control_ptr, logits_ptr, epoch, step, ring,
    x_ptr, parts_ptr, gain_ptr, weight_addr, best_value_addr, best_index_addr, all_logits_ptr,  # in x 4, out x 3
    first_row, row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, RANKS: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_row = tl.zeros([BLOCK_N], tl.int32)
    wanted = step >= tl.load(control_ptr + CONTROL_LOGITS_FROM)
    wanted_by_all = tl.load(control_ptr + CONTROL_CHOICE) != CHOOSE_BEST
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_sum(x_ptr, parts_ptr, D, SLOT_ROWS, RANKS, RING), gain, SLOT_ROWS, RING)
    num_blocks = (num_rows + BLOCK_N - 1) // BLOCK_N
    if not wanted:
        ring = skip_rows(ring, num_rows, SLOT_ROWS, RING)
        num_blocks = 0
    for block in tl.range(0, num_blocks, num_stages=1):
        ring, y = dot_rows_of_sum(
            ring, x, x_ptr, parts_ptr, gain_ptr, weight_addr, block, num_rows,
            D, SLOT_ROWS, RANKS, RING, WEIGHT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y *= inverse_rms_of_sum(ring, x_ptr, parts_ptr, D, EPS, SLOT_ROWS, RANKS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        tl.store(row_ptr + row0 + row, y, mask=row < num_rows)
        if wanted_by_all:
            push(task, all_logits_ptr + first_row + row0 + row, y, row < num_rows, 4, RANKS, PORTABLE)
        better = (row < num_rows) & (y > best)
        best_row = tl.where(better, row, best_row)
        best = tl.where(better, y, best)
    best, best_row = best_of_block(ring, best, best_row, BLOCK_N, RING)
    value = tl.max(best, axis=0)
    index = first_row + row0 + tl.min(tl.where(best == value, best_row, 0x7FFFFFFF), axis=0)
    push(task, best_value_addr.to(tl.pointer_type(tl.float32)), value, None, 4, RANKS, PORTABLE)
    push(task, best_index_addr.to(tl.pointer_type(tl.int32)), index, None, 4, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)
    return ring


def cut_rank_lm_head(
    machine: Machine,
    *,
    input: TensorHandle,
    parts: TensorHandle,
    best_value: TensorHandle,
    best_index: TensorHandle,
    all_logits: TensorHandle,
    rank: int,
    first_row: int,
    **others: object,
) -> Cut:
    best = {"best_value": replace(best_value, dims=best_value.dims[1:]), "best_index": best_index}  # one rank's row
    cut = read_sum(cut_lm_head(machine, input=input, **best, **others), input, parts)
    del cut.pointers["best_value_ptr"], cut.pointers["best_index_ptr"]
    cut.pointers["all_logits_ptr"] = all_logits
    for i, task in enumerate(cut.tasks):
        task.writes += (all_logits.span(i, i + 1),)  # counted in tasks, of which ranks have as many, unlike tokens
        part = rank * best_value.dims[1] + task.fields.pop("part")
        del task.fields["best_value_ptr"], task.fields["best_index_ptr"]
        task.fields |= {
            "best_value_addr": Address(best_value.name, part),
            "best_index_addr": Address(best_index.name, part),
            "all_logits_ptr": Address(all_logits.name),
            "first_row": first_row,
        }
    return push_to_all(cut, best_value, best_index, all_logits)


def rank_lm_head_torch(
    residual: torch.Tensor, parts: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return lm_head_torch(residual.float() + parts.float().sum(0), gain, weight, eps)


RANK_LM_HEAD = Op("lm_head", rank_lm_head_tile, cut_rank_lm_head, rank_lm_head_torch, waits_for_ranks=True)

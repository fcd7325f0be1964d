"""Final RMSNorm, language model head and the first half of argmax: logits = W @ (x_hat * gain).

x [D] fp32 read | gain [D] read | W [V, D] read | logits [V] fp32 written
best value, index [num_tasks] written
One task = consecutive rows of the vocabulary; it also leaves its largest logit and that logit's index (the lowest one
on a tie). Positions before CONTROL_LOGITS_FROM (the prompt) need no logits: their tasks only signal.
Source: transformers LlamaForCausalLM.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import (
    SUMS_BYTES,
    SUMS_OFFSET,
    block_rows,
    dot_rows,
    inverse_rms,
    load_segment,
    scale_segment,
    skip_rows,
    slot_rows,
)
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import linear_stream, rmsnorm_torch
from tri_mpk.ops.warps import read_float, write_float
from tri_mpk.scheduler.device import CONTROL_LOGITS_FROM, CONTROL_LOGITS_STRIDE, signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def best_of_block(ring, best, best_row, BLOCK_N: tl.constexpr, RING: tl.constexpr):
    """The largest values and their rows, the lowest of equal ones, as many as a warp has lanes: see ops/warps.py."""
    if RING:
        rows = tl.arange(0, BLOCK_N)
        lanes = tl.arange(0, 32)
        values_at = ring[0] + SUMS_OFFSET + SUMS_BYTES
        rows_at = values_at + BLOCK_N * 4
        write_float(values_at + rows * 4, best)
        write_float(rows_at + rows * 4, best_row.to(tl.float32, bitcast=True))
        tl.debug_barrier()
        value = tl.full([32], float("-inf"), tl.float32)
        row = tl.full([32], 0x7FFFFFFF, tl.int32)
        for first in tl.static_range(0, BLOCK_N, 32):
            next_value = read_float(values_at + (first + lanes) * 4)
            next_row = read_float(rows_at + (first + lanes) * 4).to(tl.int32, bitcast=True)
            row = tl.where((next_value > value) | ((next_value == value) & (next_row < row)), next_row, row)
            value = tl.maximum(value, next_value)
        return value, row
    else:
        return best, best_row


@triton.jit
def lm_head_tile(
    task, event_ptr, control_ptr, logits_ptr, epoch, step, ring,
    x_ptr, gain_ptr, weight_addr, best_value_ptr, best_index_ptr,  # in, in, in, out, out
    part, row0, num_rows,
    D: tl.constexpr, EPS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    best_row = tl.zeros([BLOCK_N], tl.int32)
    wanted = step >= tl.load(control_ptr + CONTROL_LOGITS_FROM)
    row_ptr = logits_ptr + step.to(tl.int64) * tl.load(control_ptr + CONTROL_LOGITS_STRIDE)
    gain = load_segment(gain_ptr, D, SLOT_ROWS, RING)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = scale_segment(ring, load_segment(x_ptr, D, SLOT_ROWS, RING), gain, SLOT_ROWS, RING)
    num_blocks = (num_rows + BLOCK_N - 1) // BLOCK_N
    if not wanted:
        ring = skip_rows(ring, num_rows, SLOT_ROWS, RING)
        num_blocks = 0
    for block in tl.range(0, num_blocks, num_stages=1):
        ring, y = dot_rows(
            ring,
            x,
            x_ptr,
            gain_ptr,
            weight_addr,
            block,
            num_rows,
            D,
            True,
            SLOT_ROWS,
            RING,
            WEIGHT,
            BLOCK_N,
            BLOCK_K,
        )
        y *= inverse_rms(ring, x_ptr, D, EPS, SLOT_ROWS, RING, BLOCK_K)
        row = block * BLOCK_N + rows
        tl.store(row_ptr + row0 + row, y, mask=row < num_rows)
        better = (row < num_rows) & (y > best)
        best_row = tl.where(better, row, best_row)
        best = tl.where(better, y, best)
    best, best_row = best_of_block(ring, best, best_row, BLOCK_N, RING)
    value = tl.max(best, axis=0)
    tl.store(best_value_ptr + part, value)
    tl.store(best_index_ptr + part, row0 + tl.min(tl.where(best == value, best_row, 0x7FFFFFFF), axis=0))
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_lm_head(
    machine: Machine,
    *,
    input: TensorHandle,
    weight_norm: TensorHandle,
    weight_linear: TensorHandle,
    best_value: TensorHandle,
    best_index: TensorHandle,
    eps: float,
    grid_dim: int | None = None,
) -> Cut:
    vocab_size, hidden_size = weight_linear.dims
    rows_at_once = slot_rows(hidden_size, machine, -(-vocab_size // best_value.numel))
    cut = Cut(
        {
            "D": hidden_size,
            "EPS": eps,
            "SLOT_ROWS": rows_at_once,
            "BLOCK_N": block_rows(machine),
        },
        {
            "x_ptr": input,
            "gain_ptr": weight_norm,
            "best_value_ptr": best_value,
            "best_index_ptr": best_index,
        },
    )
    whole, addresses = (input.whole(), weight_norm.whole()), cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(vocab_size, best_value.numel)):
        stream = linear_stream(weight_linear, lo, hi, rows_at_once)
        weight_rows = weight_linear.span(lo * hidden_size, hi * hidden_size)
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(*whole, weight_rows),
                writes=(best_value.span(i, i + 1), best_index.span(i, i + 1)),
                cost_bytes=(hi - lo) * hidden_size * weight_linear.dtype.itemsize,
                fields=addresses | {"weight_addr": stream.start, "part": i, "row0": lo, "num_rows": hi - lo},
                stream=stream,
            )
        )
    return cut


def lm_head_torch(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight.float() @ rmsnorm_torch(x, gain, eps)


LM_HEAD = Op("lm_head", lm_head_tile, cut_lm_head, lm_head_torch)

"""The output projection of attention and the residual stream: y = residual + W @ merge(parts) (+ bias).

parts [S, H, Dh], lse [S, H] fp32 read | W [N, H * Dh] read | bias [N] read | residual [N] fp32 read
y [N] fp32 written
merge(parts) = sum_s w_s parts_s with w_s = 2^lse_s / sum_s 2^lse_s over the active splits, added in one order. Every
task merges for itself while it loads its activations: at short contexts one or two splits are active, and a hop is
saved at all. One task = consecutive rows. Source: arXiv:2311.01282, section 3; transformers LlamaDecoderLayer.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tri_mpk.ops.attention import active_splits
from tri_mpk.ops.gemv import block_rows, dot_rows, own_columns, prefetch_rows, segments_of, slot_rows
from tri_mpk.ops.linear_residual import linear_residual_torch
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges
from tri_mpk.ops.rmsnorm_linear import linear_stream
from tri_mpk.ops.warps import LANES, WARPS, load_eight, load_word
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def merge_splits(
    x, top, total, parts_ptr, lse_ptr, first_split, num_splits,
    K: tl.constexpr, DH: tl.constexpr, SLOT_ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """COUNT more splits for a thread's part of the vector; per part: 8 sums, the largest lse, the weights' sum.

    All loads are under way together.
    """
    lse = ()
    parts = ()
    for i in tl.static_range(len(top)):
        col, is_there = own_columns(i, K, SLOT_ROWS)
        for s in tl.static_range(COUNT):
            wanted = is_there & (first_split + s < num_splits)
            at = first_split + s
            word = load_word(lse_ptr + at * (K // DH) + col // DH, wanted.to(tl.int32))
            lse = lse + (tl.where(wanted, word.to(tl.float32, bitcast=True), float("-inf")),)
            parts = parts + load_eight(parts_ptr + at * K + col, wanted.to(tl.int32))
    new_x = ()
    new_top = ()
    new_total = ()
    for i in tl.static_range(len(top)):
        highest = top[i]
        for s in tl.static_range(COUNT):
            highest = tl.maximum(highest, lse[i * COUNT + s])
        scale = tl.exp2(top[i] - highest)
        weights = ()
        sum = total[i] * scale
        for s in tl.static_range(COUNT):
            weight = tl.exp2(lse[i * COUNT + s] - highest)
            weights = weights + (weight,)
            sum += weight
        for e in tl.static_range(8):
            value = x[8 * i + e] * scale
            for s in tl.static_range(COUNT):
                value += weights[s] * parts[(i * COUNT + s) * 8 + e]
            new_x = new_x + (value,)
        new_top = new_top + (highest,)
        new_total = new_total + (sum,)
    return new_x, new_top, new_total


@triton.jit
def load_merged(
    parts_ptr, lse_ptr, num_splits, K: tl.constexpr, DH: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr
):
    """A thread's part of the merged vector [K] in fp32 registers, as `load_segment` loads one."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        PARTS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS) * (2 if SEGMENTS == 16 else 1)
        zero = tl.zeros([WARPS, LANES], tl.float32)
        x = ()
        top = ()
        total = ()
        for _ in tl.static_range(PARTS):
            top = top + (zero - 1e30,)  # finite: the difference of two must be a number
            total = total + (zero,)
            for _ in tl.static_range(8):
                x = x + (zero,)
        if num_splits <= 2:
            x, top, total = merge_splits(x, top, total, parts_ptr, lse_ptr, 0, num_splits, K, DH, SLOT_ROWS, 2)
        else:
            for split in tl.range(0, num_splits, 4, num_stages=1):
                x, top, total = merge_splits(x, top, total, parts_ptr, lse_ptr, split, num_splits, K, DH, SLOT_ROWS, 4)
        merged = ()
        for i in tl.static_range(PARTS):
            inverse = 1.0 / tl.maximum(total[i], 1e-30)  # nothing but zeros where there is no column
            for e in tl.static_range(8):
                merged = merged + (x[8 * i + e] * inverse,)
        return merged
    else:
        return ()


@triton.jit
def merged_columns(parts_ptr, lse_ptr, num_splits, cols, K: tl.constexpr, DH: tl.constexpr):
    """The merged vector at these columns; zeros from K on."""
    top = tl.zeros(cols.shape, tl.float32) - 1e30
    total = tl.zeros(cols.shape, tl.float32)
    x = tl.zeros(cols.shape, tl.float32)
    for split in tl.range(0, num_splits, num_stages=1):
        lse = tl.load(lse_ptr + split * (K // DH) + cols // DH, mask=cols < K, other=0.0)
        part = tl.load(parts_ptr + split * K + cols, mask=cols < K, other=0.0).to(tl.float32)
        highest = tl.maximum(top, lse)
        scale = tl.exp2(top - highest)
        weight = tl.exp2(lse - highest)
        x = x * scale + part * weight
        total = total * scale + weight
        top = highest
    return x / total


@triton.jit
def attention_output_tile(
    task, event_ptr, control_ptr, epoch, step, ring,
    parts_ptr, lse_ptr, weight_addr, bias_ptr, residual_ptr, y_ptr,  # in, in, in, in, in, out
    row0, num_rows,
    K: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SLOT_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PORTABLE: tl.constexpr, RING: tl.constexpr, PREFETCH: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    prefetch_rows(task, event_ptr, epoch, ring, PORTABLE, RING, PREFETCH)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    rows = tl.arange(0, BLOCK_N)
    num_splits = active_splits(step, NUM_SPLITS, SPLIT_TOKENS)
    x = load_merged(parts_ptr, lse_ptr, num_splits, K, DH, SLOT_ROWS, RING)
    for block in tl.range(0, (num_rows + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        row = block * BLOCK_N + rows
        y = tl.load(residual_ptr + row0 + row, mask=row < num_rows, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row0 + row, mask=row < num_rows, other=0.0).to(tl.float32)
        if RING:
            ring, product = dot_rows(
                ring, x, lse_ptr, lse_ptr, weight_addr, block, num_rows,
                K, False, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            first = tl.cast(block, tl.int64) * BLOCK_N
            weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
            product = tl.zeros([BLOCK_N], tl.float32)
            for col in tl.range(0, K, BLOCK_K, num_stages=1):
                cols = col + tl.arange(0, BLOCK_K)
                mask = (row < num_rows)[:, None] & (cols < K)[None, :]
                w = tl.load(weight_ptr + rows[:, None] * K + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                merged = merged_columns(parts_ptr, lse_ptr, num_splits, cols, K, DH)
                product += tl.sum(w * merged[None, :], axis=1)
        tl.store(y_ptr + row0 + row, y + product, mask=row < num_rows)
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_attention_output(
    machine: Machine,
    *,
    parts: TensorHandle,
    lse: TensorHandle,
    weight: TensorHandle,
    residual: TensorHandle,
    output: TensorHandle,
    split_tokens: int,
    bias: TensorHandle | None = None,
    grid_dim: int | None = None,
) -> Cut:
    num_rows, k = weight.dims
    num_tasks = min(num_rows, grid_dim or machine.num_workers)
    rows_at_once = slot_rows(k, machine, -(-num_rows // num_tasks))
    num_splits, num_heads, head_dim = parts.dims
    pointers = {"parts_ptr": parts, "lse_ptr": lse, "bias_ptr": bias or lse, "residual_ptr": residual, "y_ptr": output}
    cut = Cut(
        {
            "K": k,
            "DH": head_dim,
            "NUM_SPLITS": num_splits,
            "SPLIT_TOKENS": split_tokens,
            "HAS_BIAS": bias is not None,
            "SLOT_ROWS": rows_at_once,
            "BLOCK_N": block_rows(machine),
        },
        pointers,
    )
    everything = ((0, num_splits), (0, num_heads))
    whole, addresses = (parts.box(*everything), lse.box(*everything)), cut.addresses()
    for i, (lo, hi) in enumerate(even_ranges(num_rows, num_tasks)):
        stream = linear_stream(weight, lo, hi, rows_at_once)
        reads = (*whole, weight.span(lo * k, hi * k), residual.span(lo, hi))
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=reads + ((bias.span(lo, hi),) if bias else ()),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * k * weight.dtype.itemsize,
                fields=addresses | {"weight_addr": stream.start, "row0": lo, "num_rows": hi - lo},
                stream=stream,
            )
        )
    return cut


def attention_output_torch(
    parts: torch.Tensor,
    lse: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """parts [n, H, Dh] and lse [n, H] of the active splits."""
    share = torch.softmax(lse.float() * math.log(2.0), 0)
    merged = (parts.float() * share[..., None]).sum(0).view(-1)
    return linear_residual_torch(merged, weight, residual, bias)


ATTENTION_OUTPUT = Op("attention_output", attention_output_tile, cut_attention_output, attention_output_torch)

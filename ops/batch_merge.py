"""What attention is of its parts: h = sum_s w_s parts_s with w_s = 2^lse_s / sum_s 2^lse_s, of many tokens.

num tokens [1], positions [T] int32 read | parts [max splits, T, H, Dh], lse [max splits, T, H] fp32 read
h [T, H * Dh] written
A token at position p has p // SPLIT_TOKENS + 1 parts, added in one order. One task = one KV head, a block of tokens.
Source: arXiv:2311.01282, section 3.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tri_mpk.ops.append_kv import token_block
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task

AT_ONCE = tl.constexpr(4)  # parts on their way together


@triton.jit
def batch_merge_tile(
    task, event_ptr, control_ptr, epoch,
    num_tokens_ptr, positions_ptr, parts_ptr, lse_ptr, h_ptr,  # in, in, in, in, out
    kv_head, token0,
    H: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, MAX_TOKENS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_DH)[None, :]
    row = tl.arange(0, BLOCK_TOKENS * BLOCK_H)
    num_tokens = tl.load(num_tokens_ptr)
    token = token0 + row // BLOCK_H
    is_head = (token < num_tokens) & (row % BLOCK_H < GROUP)
    position = tl.load(positions_ptr + token, mask=is_head, other=-1)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if token0 < num_tokens:
        at = token * H + kv_head * GROUP + row % BLOCK_H
        num_splits = tl.where(is_head, position // SPLIT_TOKENS + 1, 0)
        top = tl.full([BLOCK_TOKENS * BLOCK_H], -1e30, tl.float32)  # finite: the difference of two must be a number
        total = tl.zeros([BLOCK_TOKENS * BLOCK_H], tl.float32)
        h = tl.zeros([BLOCK_TOKENS * BLOCK_H, BLOCK_DH], tl.float32)
        for first in tl.range(0, tl.max(num_splits, axis=0), AT_ONCE, num_stages=1):
            lse = ()
            parts = ()
            for i in tl.static_range(AT_ONCE):
                is_part = first + i < num_splits
                part = (first + i) * (MAX_TOKENS * H) + at
                lse = lse + (tl.load(lse_ptr + part, mask=is_part, other=float("-inf")),)
                mask = is_part[:, None] & (d < DH)
                parts = parts + (tl.load(parts_ptr + part.to(tl.int64)[:, None] * DH + d, mask=mask, other=0.0),)
            for i in tl.static_range(AT_ONCE):
                highest = tl.maximum(top, lse[i])
                scale = tl.exp2(top - highest)
                weight = tl.exp2(lse[i] - highest)
                h = h * scale[:, None] + parts[i].to(tl.float32) * weight[:, None]
                total = total * scale + weight
                top = highest
        h = (h / tl.where(total > 0, total, 1.0)[:, None]).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at[:, None] * DH + d, h, mask=is_head[:, None] & (d < DH))
    signal(task, event_ptr, PORTABLE)


def cut_batch_merge(
    machine: Machine,
    *,
    num_tokens: TensorHandle,
    token_positions: TensorHandle,
    parts: TensorHandle,
    lse: TensorHandle,
    output: TensorHandle,
    num_kv_heads: int,
    num_parts: int,
    split_tokens: int,
    grid_dim: int | None = None,
) -> Cut:
    if grid_dim is not None:
        raise ValueError(f"batch_merge is cut by KV heads and tokens, got grid_dim={grid_dim}; leave grid_dim out")
    _, max_tokens, num_q_heads, head_dim = parts.dims
    group = num_q_heads // num_kv_heads
    block = token_block(max_tokens, num_kv_heads, machine.num_workers)
    cut = Cut(
        {
            "H": num_q_heads, "GROUP": group, "DH": head_dim, "MAX_TOKENS": max_tokens, "SPLIT_TOKENS": split_tokens,
            "BLOCK_TOKENS": block, "BLOCK_H": next_power_of_2(group), "BLOCK_DH": next_power_of_2(head_dim),
        },
        {
            "num_tokens_ptr": num_tokens, "positions_ptr": token_positions, "parts_ptr": parts, "lse_ptr": lse,
            "h_ptr": output,
        },
    )  # fmt: skip
    addresses = cut.addresses()
    for head in range(num_kv_heads):
        heads = (head * group * head_dim, (head + 1) * group * head_dim)
        own = ((0, num_parts), (head, head + 1))  # as attention's tasks write them
        for i, token0 in enumerate(range(0, max_tokens, block)):
            cut.tasks.append(
                Task(
                    op=0,
                    tile=(head, i),
                    reads=(num_tokens.whole(), token_positions.whole(), parts.box(*own), lse.box(*own)),
                    writes=(output.box((token0, min(token0 + block, max_tokens)), heads),),
                    cost_bytes=2 * block * group * head_dim * parts.dtype.itemsize,
                    fields=addresses | {"kv_head": head, "token0": token0},
                )
            )
    return cut


def batch_merge_torch(parts: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """parts [n, H, Dh] and lse [n, H] of one token's splits: [H * Dh]."""
    share = torch.softmax(lse.float() * math.log(2.0), 0)
    return (parts.float() * share[..., None]).sum(0).view(-1)


BATCH_MERGE = Op("batch_merge", batch_merge_tile, cut_batch_merge, batch_merge_torch)

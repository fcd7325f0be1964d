"""Attention of one new token over a paged KV cache, split over the KV length.

qkv [(H + 2 Hkv) * Dh] read | q, k gain [Dh] read | cos, sin [max_seq_len, Dh] fp32 read
page_table [num_pages] int32 read
k, v cache [num_pages, Hkv, page_size, Dh] read and appended to | parts [S, H, Dh], lse [S, H] fp32 written
The new token's q and k are normalised (Qwen3) and rotated here. As many splits are active as there are SPLIT_TOKENS
older tokens, at least one and at most S; split s of n takes blocks s*b//n to (s+1)*b//n of the b blocks of older
tokens, as an online softmax in base 2. The first split also takes the new token and appends its k and v. A part is
what its tokens alone would give; lse is the logarithm (base 2) of its sum of exponentials, by which whoever reads the
parts weighs them. Older rows of the cache are of earlier steps, so they may be loaded before the wait.

One task = one KV head, one split. Where weights come through the ring, each warp has blocks of its own
(attention_by_warps.py); the form here, for all other machines, is all warps together, by tl.dot.
Source: arXiv:2205.14135, 2311.01282 (flash decoding); transformers Qwen3Attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tri_mpk.ops.attention_by_warps import attend_by_warps
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.ops.rotary import inverse_norms, load_head, rotate_head
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def active_splits(step, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr):
    """How many of the splits have tokens, when there are `step` older ones."""
    return tl.minimum(tl.maximum((step + SPLIT_TOKENS - 1) // SPLIT_TOKENS, 1), NUM_SPLITS)


@triton.jit
def load_block(
    cache_ptr, page_table_ptr, kv_head, block, last, step,
    HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_KV, BLOCK_DH] of older tokens; zeros from `last` on."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    position = block * BLOCK_KV + tl.arange(0, BLOCK_KV)
    page = tl.load(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, mask=block < last, other=0).to(tl.int64)
    row = (page * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE + tl.arange(0, BLOCK_KV)
    wanted = (position < step) & (block < last)
    return tl.load(cache_ptr + row[:, None] * DH + d, mask=wanted[:, None] & (d < DH), other=0.0)


@triton.jit
def attend_by_blocks(
    task, event_ptr, control_ptr, epoch, step,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,
    k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    is_first = split == 0
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // num_splits
    last = (split + 1) * num_blocks // num_splits
    new_page = tl.load(page_table_ptr + step // PAGE_SIZE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if split < num_splits:
        cos_row = tl.load(cos_ptr + step * DH + d, mask=d < DH, other=0.0)
        sin_row = tl.load(sin_ptr + step * DH + d, mask=d < DH, other=0.0)
        q, q_partner = load_head(qkv_ptr, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH)
        q_rstd = inverse_norms(q, DH, NORM, EPS)
        q = rotate_head(q, q_partner, q_rstd, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
        q *= SCALE * 1.4426950408889634  # log2(e)
        m = tl.full([BLOCK_H], -1e30, tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DH], tl.float32)
        if is_first:  # the new token
            k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, 1, 1, DH, BLOCK_DH)
            v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=d < DH, other=0.0)
            k_rstd = inverse_norms(k_new, DH, NORM, EPS)
            k_new = rotate_head(k_new, k_partner, k_rstd, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
            k_new = k_new.to(k_cache_ptr.dtype.element_ty)
            v_new = v_new.to(v_cache_ptr.dtype.element_ty)
            row = ((new_page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + row + d, k_new, mask=d < DH)
            tl.store(v_cache_ptr + row + d, v_new, mask=d < DH)
            m = tl.sum(q.to(k_new.dtype).to(tl.float32) * k_new.to(tl.float32), axis=1)
            l += 1.0
            acc += v_new.to(tl.float32)
        q = q.to(k_cache_ptr.dtype.element_ty)
        for block in tl.range(first, last, num_stages=1):
            k = load_block(
                k_cache_ptr, page_table_ptr, kv_head, block, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV
            )
            v = load_block(
                v_cache_ptr, page_table_ptr, kv_head, block, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where((block * BLOCK_KV + tl.arange(0, BLOCK_KV) < step)[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
        h = tl.arange(0, BLOCK_H)
        head = split * H + kv_head * GROUP + h
        part = (acc / l[:, None]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + head[:, None] * DH + d, part, mask=(h < GROUP)[:, None] & (d < DH))
        tl.store(lse_ptr + head, m + tl.log2(l), mask=h < GROUP)


@triton.jit
def attention_tile(
    task, event_ptr, control_ptr, epoch, step, ring,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,  # in
    k_cache_ptr, v_cache_ptr,  # in and out
    parts_ptr, lse_ptr,  # out
    kv_head, split,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BY_WARPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    num_splits = active_splits(step, NUM_SPLITS, SPLIT_TOKENS)
    if BY_WARPS:
        attend_by_warps(
            task, event_ptr, control_ptr, epoch, step, ring[0], qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,
            page_table_ptr, k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
            H, HKV, DH, PAGE_SIZE, SCALE, NORM, EPS, BLOCK_H, BLOCK_DH, BLOCK_KV, PORTABLE,
        )  # fmt: skip
    else:
        attend_by_blocks(
            task, event_ptr, control_ptr, epoch, step, qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr,
            page_table_ptr, k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
            H, HKV, DH, PAGE_SIZE, SCALE, NORM, EPS, BLOCK_H, BLOCK_DH, BLOCK_KV, PORTABLE,
        )  # fmt: skip
    signal(task, event_ptr, PORTABLE)
    return ring


def cut_attention(
    machine: Machine,
    *,
    input: TensorHandle,
    k_cache: TensorHandle,
    v_cache: TensorHandle,
    page_table: TensorHandle,
    cos_pos_embed: TensorHandle,
    sin_pos_embed: TensorHandle,
    parts: TensorHandle,
    lse: TensorHandle,
    num_q_heads: int,
    scale: float,
    block_kv: int,
    split_tokens: int,
    q_norm: TensorHandle | None = None,
    k_norm: TensorHandle | None = None,
    eps: float = 1e-6,
    grid_dim: int | None = None,
) -> Cut:
    _, num_kv_heads, page_size, head_dim = k_cache.dims
    num_splits = parts.dims[0]
    group = num_q_heads // num_kv_heads
    by_warps = machine.ring and group <= 8 and head_dim % 16 == 0 and head_dim <= 128
    pointers = {
        "qkv_ptr": input,
        "q_gain_ptr": q_norm or input,
        "k_gain_ptr": k_norm or input,
        "cos_ptr": cos_pos_embed,
        "sin_ptr": sin_pos_embed,
        "page_table_ptr": page_table,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "parts_ptr": parts,
        "lse_ptr": lse,
    }
    cut = Cut(
        {
            "H": num_q_heads,
            "HKV": num_kv_heads,
            "DH": head_dim,
            "NUM_SPLITS": num_splits,
            "SPLIT_TOKENS": split_tokens,
            "PAGE_SIZE": page_size,
            "SCALE": scale,
            "NORM": q_norm is not None,
            "EPS": eps if q_norm is not None else 0.0,  # equal shapes share a kernel
            "BY_WARPS": by_warps,
            # what the tensor cores take; 16 is the least of tl.dot
            "BLOCK_H": 8 if by_warps else next_power_of_2(max(group, 16)),
            "BLOCK_DH": next_power_of_2(head_dim),
            "BLOCK_KV": block_kv,
        },
        pointers,
    )
    addresses = cut.addresses()
    tables = tuple(t.whole() for t in (q_norm, k_norm, cos_pos_embed, sin_pos_embed, page_table) if t)
    cache_bytes = 2 * k_cache.dims[0] * page_size * head_dim * k_cache.dtype.itemsize
    for head in range(num_kv_heads):
        q = input.span(head * group * head_dim, (head + 1) * group * head_dim)
        k = input.span((num_q_heads + head) * head_dim, (num_q_heads + head + 1) * head_dim)
        v_head = num_q_heads + num_kv_heads + head
        v = input.span(v_head * head_dim, (v_head + 1) * head_dim)
        heads = (head * group, (head + 1) * group)
        for split in range(num_splits):
            # which rows of the cache a split owns is known only at run time: its region is (kv_head, split)
            rows = tuple(cache.box((head, head + 1), (split, split + 1)) for cache in (k_cache, v_cache))
            own = (split, split + 1)
            cut.tasks.append(
                Task(
                    op=0,
                    tile=(head, split),
                    reads=((q, k, v) if split == 0 else (q,)) + rows + tables,
                    writes=rows + (parts.box(own, heads), lse.box(own, heads)),
                    cost_bytes=cache_bytes // num_splits,
                    fields=addresses | {"kv_head": head, "split": split},
                )
            )
    return cut


def attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [H, Dh], k and v [Hkv, Dh] of the new token, rotated; caches [T, Hkv, Dh] of the older ones: out [H, Dh]."""
    keys = torch.cat((k_cache, k[None])).float().repeat_interleave(q.shape[0] // k.shape[0], 1)
    values = torch.cat((v_cache, v[None])).float().repeat_interleave(q.shape[0] // k.shape[0], 1)
    weights = torch.softmax(torch.einsum("hd,thd->ht", q.float(), keys) * scale, -1)
    return torch.einsum("ht,thd->hd", weights, values)


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


ATTENTION = Op("attention", attention_tile, cut_attention, attention_torch)

"""Attention of one new token over a paged KV cache, split over the KV length.

qkv [(H + 2 Hkv) * Dh] read | q, k gain [Dh] read | cos, sin [max_seq_len, Dh] fp32 read
page_table [num_pages] int32 read
k, v cache [num_pages, Hkv, page_size, Dh] read and appended to | acc [S, H, Dh], max, sum [S, H] fp32 written
The new token's q and k are normalised (Qwen3) and rotated here. Split s of S takes blocks s*n//S to (s+1)*n//S of the n
blocks of older tokens, as an online softmax in base 2; the last split also takes the new token, from registers, and
appends its k and v. Older rows of the cache are of earlier steps, so they may be loaded before the wait.
One task = one KV head, one split. Source: arXiv:2205.14135, 2311.01282 (flash decoding); transformers Qwen3Attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task


@triton.jit
def load_head(ptr, head, num_heads, HEADS: tl.constexpr, DH: tl.constexpr, BLOCK_DH: tl.constexpr):
    """Rows `head` to `head + num_heads` of a [heads, Dh] matrix, and each element's partner in rotate_half."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    h = tl.arange(0, HEADS)[:, None]
    mask = (h < num_heads) & (d < DH)
    base = ptr + (head + h) * DH
    partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
    return tl.load(base + d, mask=mask, other=0.0), tl.load(base + partner, mask=mask, other=0.0)


@triton.jit
def rotate_head(
    x, x_partner, gain_ptr, cos_row, sin_row,
    DH: tl.constexpr, BLOCK_DH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Normalised (if NORM) and rotated: x * cos + rotate_half(x) * sin."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    x = x.to(tl.float32)
    x_partner = x_partner.to(tl.float32)
    if NORM:
        partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / DH + EPS)[:, None]
        x *= rstd * tl.load(gain_ptr + d, mask=d < DH, other=0.0).to(tl.float32)
        x_partner *= rstd * tl.load(gain_ptr + partner, mask=d < DH, other=0.0).to(tl.float32)
    return x * cos_row + tl.where(d < DH // 2, -x_partner, x_partner) * sin_row


@triton.jit
def load_block(
    cache_ptr, page_table_ptr, kv_head, block, last, step,
    HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Keys or values [NUM_BLOCKS * BLOCK_KV, BLOCK_DH] of older tokens, from a block on; zeros from `last` on."""
    d = tl.arange(0, BLOCK_DH)[None, :]
    position = block * BLOCK_KV + tl.arange(0, NUM_BLOCKS * BLOCK_KV)
    wanted = (position < step) & (position < last * BLOCK_KV)
    if NUM_BLOCKS == 1:  # within one page
        page = tl.load(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, mask=block < last, other=0).to(tl.int64)
        row = (page * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE + tl.arange(0, BLOCK_KV)
    else:
        page = tl.load(page_table_ptr + position // PAGE_SIZE, mask=wanted, other=0).to(tl.int64)
        row = (page * HKV + kv_head) * PAGE_SIZE + position % PAGE_SIZE
    return tl.load(cache_ptr + row[:, None] * DH + d, mask=wanted[:, None] & (d < DH), other=0.0)


@triton.jit
def attend(q, k, v, position0, step, m, l, acc):
    """One step of the online softmax: keys and values of the tokens from `position0` on."""
    position = position0 + tl.arange(0, k.shape[0])
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where((position < step)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def attention_tile(
    task, event_ptr, control_ptr, epoch, step,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,  # in
    k_cache_ptr, v_cache_ptr,  # in and out
    acc_ptr, max_ptr, sum_ptr,  # out
    kv_head, split,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, NUM_SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    d_mask = d < DH
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // NUM_SPLITS
    last = (split + 1) * num_blocks // NUM_SPLITS
    is_last = split == NUM_SPLITS - 1
    cos_row = tl.load(cos_ptr + step * DH + d, mask=d_mask, other=0.0)
    sin_row = tl.load(sin_ptr + step * DH + d, mask=d_mask, other=0.0)
    # nobody writes older rows of the cache in this step: the first small block is on its way while we wait
    SMALL_PER_LARGE: tl.constexpr = 2
    first_small = last - (last - first) % SMALL_PER_LARGE
    k = load_block(
        k_cache_ptr, page_table_ptr, kv_head, first_small, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, 1
    )
    v = load_block(
        v_cache_ptr, page_table_ptr, kv_head, first_small, last, step, HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, 1
    )
    new_page = tl.load(page_table_ptr + step // PAGE_SIZE).to(tl.int64)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if is_last | (first < last):
        # all loads before the first use of one: they are under way together
        q, q_partner = load_head(qkv_ptr, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH)
        k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, is_last.to(tl.int32), 1, DH, BLOCK_DH)
        v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=d_mask & is_last, other=0.0)
        q = rotate_head(q, q_partner, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS)
        q *= SCALE * 1.4426950408889634  # log2(e)
        m = tl.full([BLOCK_H], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DH], tl.float32)
        if is_last:  # the new token
            k_new = rotate_head(k_new, k_partner, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS)
            k_new = k_new.to(k_cache_ptr.dtype.element_ty)
            v_new = v_new.to(v_cache_ptr.dtype.element_ty)
            row = ((new_page * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + row + d, k_new, mask=d_mask)
            tl.store(v_cache_ptr + row + d, v_new, mask=d_mask)
            m = tl.sum(q.to(k_new.dtype).to(tl.float32) * k_new.to(tl.float32), axis=1)
            l += 1.0
            acc += v_new.to(tl.float32)
        q = q.to(k_cache_ptr.dtype.element_ty)
        # long contexts: many tokens under way at once
        for block in tl.range(first, first_small, SMALL_PER_LARGE, num_stages=1):
            k_large = load_block(
                k_cache_ptr, page_table_ptr, kv_head, block, first_small, step,
                HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, SMALL_PER_LARGE,
            )  # fmt: skip
            v_large = load_block(
                v_cache_ptr, page_table_ptr, kv_head, block, first_small, step,
                HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, SMALL_PER_LARGE,
            )  # fmt: skip
            m, l, acc = attend(q, k_large, v_large, block * BLOCK_KV, step, m, l, acc)
        for block in tl.range(first_small, last, num_stages=1):
            m, l, acc = attend(q, k, v, block * BLOCK_KV, step, m, l, acc)
            k = load_block(
                k_cache_ptr, page_table_ptr, kv_head, block + 1, last, step,
                HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, 1,
            )  # fmt: skip
            v = load_block(
                v_cache_ptr, page_table_ptr, kv_head, block + 1, last, step,
                HKV, DH, PAGE_SIZE, BLOCK_DH, BLOCK_KV, 1,
            )  # fmt: skip
        h = tl.arange(0, BLOCK_H)
        head = split * H + kv_head * GROUP + h
        tl.store(acc_ptr + head[:, None] * DH + d, acc, mask=(h < GROUP)[:, None] & d_mask)
        tl.store(max_ptr + head, m, mask=h < GROUP)
        tl.store(sum_ptr + head, l, mask=h < GROUP)
    signal(task, event_ptr, PORTABLE)


def choose_splits(num_kv_heads: int, num_workers: int) -> int:
    """Splits per KV head so that at least 95 % of the workers have one, in one round where that is possible."""
    num_splits = max(1, num_workers // num_kv_heads)
    while num_kv_heads * num_splits < 0.95 * num_workers:
        num_splits += 1
    return num_splits


def cut_attention(
    machine: Machine,
    *,
    input: TensorHandle,
    k_cache: TensorHandle,
    v_cache: TensorHandle,
    page_table: TensorHandle,
    cos_pos_embed: TensorHandle,
    sin_pos_embed: TensorHandle,
    acc: TensorHandle,
    row_max: TensorHandle,
    row_sum: TensorHandle,
    num_q_heads: int,
    scale: float,
    block_kv: int,
    q_norm: TensorHandle | None = None,
    k_norm: TensorHandle | None = None,
    eps: float = 1e-6,
    grid_dim: int | None = None,
) -> Cut:
    _, num_kv_heads, page_size, head_dim = k_cache.dims
    num_splits = acc.dims[0]
    group = num_q_heads // num_kv_heads
    pointers = {
        "qkv_ptr": input,
        "q_gain_ptr": q_norm or input,
        "k_gain_ptr": k_norm or input,
        "cos_ptr": cos_pos_embed,
        "sin_ptr": sin_pos_embed,
        "page_table_ptr": page_table,
        "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache,
        "acc_ptr": acc,
        "max_ptr": row_max,
        "sum_ptr": row_sum,
    }
    cut = Cut(
        {
            "H": num_q_heads,
            "HKV": num_kv_heads,
            "DH": head_dim,
            "NUM_SPLITS": num_splits,
            "PAGE_SIZE": page_size,
            "SCALE": scale,
            "NORM": q_norm is not None,
            "EPS": eps if q_norm is not None else 0.0,  # equal shapes share a kernel
            "BLOCK_H": next_power_of_2(group) if group > 16 else 16,  # the least that tl.dot takes
            "BLOCK_DH": next_power_of_2(head_dim),
            "BLOCK_KV": block_kv,
        },
        pointers,
    )
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
                    reads=((q, k, v) if split == num_splits - 1 else (q,)) + rows + tables,
                    writes=rows + (acc.box(own, heads), row_max.box(own, heads), row_sum.box(own, heads)),
                    cost_bytes=cache_bytes // num_splits,
                    fields={name: Address(tensor.name) for name, tensor in pointers.items()}
                    | {"kv_head": head, "split": split},
                )
            )
    return cut


def rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [H, Dh], k and v [Hkv, Dh] of the new token, rotated; caches [T, Hkv, Dh] of the older ones: out [H, Dh]."""
    keys = torch.cat((k_cache, k[None])).float().repeat_interleave(q.shape[0] // k.shape[0], 1)
    values = torch.cat((v_cache, v[None])).float().repeat_interleave(q.shape[0] // k.shape[0], 1)
    weights = torch.softmax(torch.einsum("hd,thd->ht", q.float(), keys) * scale, -1)
    return torch.einsum("ht,thd->hd", weights, values)


def choose_block_kv(num_kv_heads: int, num_workers: int, head_dim: int) -> int:
    """The largest block of at most 4096 elements that still gives 95 % of the workers one at 4096 tokens."""
    block_kv = 64 if head_dim <= 64 else 32
    while block_kv > 16 and 4096 // block_kv * num_kv_heads < 0.95 * num_workers:
        block_kv //= 2
    return block_kv


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


ATTENTION = Op("attention", attention_tile, cut_attention, attention_torch)

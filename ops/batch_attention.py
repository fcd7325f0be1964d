"""Attention of the step's tokens over the paged KV cache, their own keys and values included.

counts [2], items [.., 4] int32 read: what there is to do, see batch_items | page table [S, pages] int32 read
q [T, H, Dh] read, rotated and times the scale in base 2 | k, v cache [num_pages, Hkv, page_size, Dh] read
parts [max splits, T, H, Dh], lse [max splits, T, H] fp32 written
An item is up to BLOCK_TOKENS tokens of a sequence and SPLIT_TOKENS positions; its rows are all heads of the group of
these tokens. Each row attends to the positions up to its own, block by block, as an online softmax in base 2. A block
is a whole split, where registers and shared memory have room for it: what takes time is how often threads wait for each
other, not how many positions there are. Splits and blocks begin at multiples of their size, and a block that lies
behind a row's position changes none of its bits, so a token's result depends neither on its neighbours nor on how a
prompt was cut into chunks.

One task = one KV head, every num_parts-th item. BLOCK_M < 64 rows, as in batch_gemm: one kind of instruction.
Source: arXiv:2205.14135, 2311.01282 (flash decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.batch_items import ITEM_WORDS
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Task

BLOCK_M = 32  # rows: tokens times heads of a group
BLOCK_BYTES = 64 << 10
PREFETCH_ITEMS = tl.constexpr(True)  # whether L2 is asked for what a worker's next item reads


@triton.jit
def item_extent(items_ptr, index, num_items):
    """Of an item: first token | split << 16, sequence, position of the last token; if there is none, -1 for that."""
    item_ptr = items_ptr + index * ITEM_WORDS
    is_item = index < num_items
    return (
        tl.load(item_ptr, mask=is_item, other=0),
        tl.load(item_ptr + 2, mask=is_item, other=0),
        tl.load(item_ptr + 3, mask=is_item, other=-1),
    )


@triton.jit
def item_lines(
    extent, page_table_ptr, k_cache_ptr, kv_head, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr,
    NUM_PAGES: tl.constexpr, SPLIT_TOKENS: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Where in the caches the lines of an item's first block begin, and which are wanted [BLOCK_KV, lines of a row]."""
    LINE: tl.constexpr = 128 // (k_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
    item, sequence, last_position = extent
    kv = (item >> 16) * SPLIT_TOKENS + tl.arange(0, BLOCK_KV)[:, None]
    d = tl.arange(0, (BLOCK_DH + LINE - 1) // LINE)[None, :] * LINE
    is_kv = kv <= last_position
    page = tl.load(page_table_ptr + sequence * NUM_PAGES + kv // PAGE_SIZE, mask=is_kv, other=0).to(tl.int64)
    return ((page * HKV + kv_head) * PAGE_SIZE + kv % PAGE_SIZE) * DH + d, (is_kv & (d < DH)).to(tl.int32)


@triton.jit
def prefetch_lines(lines, k_cache_ptr, v_cache_ptr):
    """Nothing waits for them: two instructions of a thread, if it has a line."""
    at, wanted = lines
    tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.s32 p, $3, 0;
        @p prefetch.global.L2 [$1];
        @p prefetch.global.L2 [$2];
        mov.u32 $0, 0;
        }""",
        "=r,l,l,r",
        [(k_cache_ptr + at).to(tl.int64), (v_cache_ptr + at).to(tl.int64), wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def batch_attention_tile(
    task, event_ptr, control_ptr, epoch,
    counts_ptr, items_ptr, page_table_ptr, q_ptr, k_cache_ptr, v_cache_ptr,  # in
    parts_ptr, lse_ptr,  # out
    kv_head, part,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_PAGES: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    rows = tl.arange(0, BLOCK_M)
    AHEAD: tl.constexpr = PREFETCH_ITEMS and not PORTABLE
    if AHEAD:
        # The first two items' lines while we wait: nobody writes older rows of the cache in this step. The list may be
        # that of the step before, since only the wait makes sure: those, too, are rows that exist.
        num_items = tl.load(counts_ptr)
        extent = item_extent(items_ptr, part, num_items)
        later = item_extent(items_ptr, part + NUM_PARTS, num_items)
        lines = item_lines(
            extent, page_table_ptr, k_cache_ptr, kv_head,
            HKV, DH, PAGE_SIZE, NUM_PAGES, SPLIT_TOKENS, BLOCK_DH, BLOCK_KV,
        )  # fmt: skip
        prefetch_lines(lines, k_cache_ptr, v_cache_ptr)
        lines = item_lines(
            later, page_table_ptr, k_cache_ptr, kv_head,
            HKV, DH, PAGE_SIZE, NUM_PAGES, SPLIT_TOKENS, BLOCK_DH, BLOCK_KV,
        )  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    num_items = tl.load(counts_ptr)
    for index in tl.range(part, num_items, NUM_PARTS, num_stages=1, disable_licm=True):
        item_ptr = items_ptr + index * ITEM_WORDS
        item = tl.load(item_ptr)
        last_token = tl.load(item_ptr + 1)
        sequence = tl.load(item_ptr + 2)
        last_position = tl.load(item_ptr + 3)
        token0 = item & 0xFFFF
        split = item >> 16
        token = token0 + rows // GROUP
        is_row = token <= last_token
        position = tl.where(is_row, last_position - last_token + token, -1)
        at = token * H + kv_head * GROUP + rows % GROUP
        q = tl.load(q_ptr + at[:, None] * DH + d, mask=is_row[:, None] & (d < DH), other=0.0)
        if AHEAD:
            # the next item's lines, whose addresses are known, and of the one after that what they follow from
            prefetch_lines(lines, k_cache_ptr, v_cache_ptr)
            later = item_extent(items_ptr, index + 2 * NUM_PARTS, num_items)
        first = split * SPLIT_TOKENS
        last = tl.minimum(first + SPLIT_TOKENS, last_position + 1)
        m = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: the difference of two must be a number
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DH], tl.float32)
        for start in tl.range(first, last, BLOCK_KV, num_stages=1):
            kv = start + tl.arange(0, BLOCK_KV)
            page = tl.load(page_table_ptr + sequence * NUM_PAGES + kv // PAGE_SIZE, mask=kv < last, other=0)
            row = ((page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + kv % PAGE_SIZE)[:, None] * DH + d
            mask = (kv < last)[:, None] & (d < DH)
            k = tl.load(k_cache_ptr + row, mask=mask, other=0.0)
            v = tl.load(v_cache_ptr + row, mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where(kv[None, :] <= position[:, None], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
        if AHEAD:
            lines = item_lines(
                later, page_table_ptr, k_cache_ptr, kv_head,
                HKV, DH, PAGE_SIZE, NUM_PAGES, SPLIT_TOKENS, BLOCK_DH, BLOCK_KV,
            )  # fmt: skip
        at += split * (MAX_TOKENS * H)
        is_row = is_row & (position >= first)  # earlier tokens of the block may have nothing in the last split
        result = (acc / tl.where(l > 0, l, 1.0)[:, None]).to(parts_ptr.dtype.element_ty)
        tl.store(parts_ptr + at[:, None] * DH + d, result, mask=is_row[:, None] & (d < DH))
        tl.store(lse_ptr + at, m + tl.log2(tl.where(l > 0, l, 1.0)), mask=is_row)
    signal(task, event_ptr, PORTABLE)


def block_tokens(num_q_heads: int, num_kv_heads: int) -> int:
    """Tokens of an item."""
    return max(1, BLOCK_M // (num_q_heads // num_kv_heads))


def block_positions(split_tokens: int, head_dim: int, itemsize: int) -> int:
    """BLOCK_KV: positions that are loaded at once, a whole split if it fits BLOCK_BYTES of keys."""
    return min(split_tokens, BLOCK_BYTES // (next_power_of_2(head_dim) * itemsize))


def num_item_parts(num_kv_heads: int, num_workers: int) -> int:
    """How many tasks share the items of a KV head: together as many as there are workers, at most."""
    return max(1, num_workers // num_kv_heads)


def cut_batch_attention(
    machine: Machine,
    *,
    counts: TensorHandle,
    items: TensorHandle,
    page_table: TensorHandle,
    q: TensorHandle,
    k_cache: TensorHandle,
    v_cache: TensorHandle,
    parts: TensorHandle,
    lse: TensorHandle,
    split_tokens: int,
    grid_dim: int | None = None,
) -> Cut:
    _, num_kv_heads, page_size, head_dim = k_cache.dims
    max_tokens, num_q_heads, _ = q.dims
    group = num_q_heads // num_kv_heads
    num_parts = grid_dim or num_item_parts(num_kv_heads, machine.num_workers)
    pointers = {
        "counts_ptr": counts, "items_ptr": items, "page_table_ptr": page_table, "q_ptr": q, "k_cache_ptr": k_cache,
        "v_cache_ptr": v_cache, "parts_ptr": parts, "lse_ptr": lse,
    }  # fmt: skip
    cut = Cut(
        {
            "H": num_q_heads, "HKV": num_kv_heads, "DH": head_dim,
            "PAGE_SIZE": page_size, "NUM_PAGES": page_table.dims[1], "NUM_PARTS": num_parts,
            "MAX_TOKENS": max_tokens, "SPLIT_TOKENS": split_tokens,
            "BLOCK_M": max(BLOCK_M, next_power_of_2(group)), "BLOCK_DH": next_power_of_2(head_dim),
            "BLOCK_KV": block_positions(split_tokens, head_dim, k_cache.dtype.itemsize),
        },
        pointers,
    )  # fmt: skip
    whole, addresses = (counts.whole(), items.whole(), page_table.whole()), cut.addresses()
    cache_bytes = split_tokens * head_dim * 2 * k_cache.dtype.itemsize  # of an item, the only measure there is
    for head in range(num_kv_heads):
        heads = (head * group * head_dim, (head + 1) * group * head_dim)
        rows = tuple(cache.box((head, head + 1), (0, max_tokens)) for cache in (k_cache, v_cache))
        for part in range(num_parts):
            # which tokens' parts these are is known only at run time: a region of (part, KV head)
            own = ((part, part + 1), (head, head + 1))
            cut.tasks.append(
                Task(
                    op=0,
                    tile=(head, part),
                    reads=(*whole, q.box((0, max_tokens), heads), *rows),
                    writes=(parts.box(*own), lse.box(*own)),
                    cost_bytes=cache_bytes,
                    fields=addresses | {"kv_head": head, "part": part},
                )
            )
    return cut


def batch_attention_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """q [n, H, Dh] of a sequence's tokens at these positions, in base 2; all its k, v [length, Hkv, Dh]: [n, H, Dh]."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,thd->nht", q.float(), k) * 0.6931471805599453
    seen = torch.arange(len(k))[None, :] <= positions[:, None]
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), -1)
    return torch.einsum("nht,thd->nhd", weights, v)


BATCH_ATTENTION = Op("batch_attention", batch_attention_tile, cut_batch_attention, batch_attention_torch)

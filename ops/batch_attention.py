"""Attention of the step's tokens over the paged KV cache, their own keys and values included.

counts [2], items [.., 4] int32 read: what there is to do, see batch_items | page table [S, pages] int32 read
q [T, H, Dh] read, rotated and times the scale in base 2 | k, v cache [num_pages, Hkv, page_size, Dh] read
parts [max splits, T, H, Dh], lse [max splits, T, H] fp32 written
An item is up to BLOCK_TOKENS tokens of a sequence and SPLIT_TOKENS positions; its rows are all heads of the group of
these tokens. Each row attends to the positions up to its own, block by block, as an online softmax in base 2. Splits
and blocks begin at multiples of their size, and a block that lies behind a row's position changes none of its bits, so
a token's result depends neither on its neighbours nor on how a prompt was cut into chunks.

One task = one KV head, every num_parts-th item. All blocks of all its items are one loop, which Triton pipelines: while
one is computed, keys, values and queries of the next one are copied to shared memory, be it of this item or of another.
Blocks are as large as two of them fit there: what takes time besides is how often threads wait for each other, not how
many positions there are. So the sum of an item's weights, too, is left where it arises until its last block is done.
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

BLOCK_M = 16  # rows: tokens times heads of a group. With 32 prompts are 5 % faster, and 64 sequences 6 % slower
BLOCK_POSITIONS = 128  # at once, if keys of so many take no more than
BLOCK_BYTES = 32 << 10
STAGES = tl.constexpr(3)  # of the loop: one block less is in shared memory, or on its way there


@triton.jit
def load_item(items_ptr, index, num_items):
    """First token | split << 16, last token, sequence, position of the last token; if there is none, no positions."""
    item_ptr = items_ptr + index * ITEM_WORDS
    is_item = index < num_items
    return (
        tl.load(item_ptr, mask=is_item, other=0),
        tl.load(item_ptr + 1, mask=is_item, other=-1),
        tl.load(item_ptr + 2, mask=is_item, other=0),
        tl.load(item_ptr + 3, mask=is_item, other=-1),
    )


@triton.jit
def positions_of(word, last_position, SPLIT_TOKENS: tl.constexpr):
    """The first position of an item, and the end."""
    first = (word >> 16) * SPLIT_TOKENS
    return first, tl.minimum(first + SPLIT_TOKENS, last_position + 1)


@triton.jit
def block_after(item, index, block, NUM_PARTS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Which item, and which block of it, follows block `block` of item `index`; whether it is another item."""
    first, end = positions_of(item[0], item[3], SPLIT_TOKENS)
    is_last = first + (block + 1) * BLOCK_KV >= end
    return tl.where(is_last, index + NUM_PARTS, index), tl.where(is_last, 0, block + 1), is_last


@triton.jit
def load_pages(kv, end, sequence, page_table_ptr, PAGE_SIZE: tl.constexpr, NUM_PAGES: tl.constexpr):
    return tl.load(page_table_ptr + sequence * NUM_PAGES + kv.to(tl.uint32) // PAGE_SIZE, mask=kv < end, other=0)


@triton.jit
def item_rows(item, rows, kv_head, H: tl.constexpr, GROUP: tl.constexpr):
    """Of an item's rows: their number in q, token times H plus head; their position, -1 if there is no such token."""
    token = (item[0] & 0xFFFF) + rows // GROUP
    position = tl.where(token <= item[1], item[3] - item[1] + token, -1)
    return token * H + kv_head * GROUP + rows % GROUP, position


@triton.jit
def log2(x, PORTABLE: tl.constexpr):
    """A single instruction, where `tl.log2` has thirty."""
    if PORTABLE:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def count_blocks(
    items_ptr, num_items, part,
    NUM_PARTS: tl.constexpr, MAX_ITEMS: tl.constexpr, SPLIT_TOKENS: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Of all items of a task."""
    index = part + tl.arange(0, MAX_ITEMS) * NUM_PARTS
    item_ptr = items_ptr + index * ITEM_WORDS
    word = tl.load(item_ptr, mask=index < num_items, other=0)
    last_position = tl.load(item_ptr + 3, mask=index < num_items, other=-1)
    first, end = positions_of(word, last_position, SPLIT_TOKENS)
    return tl.sum((end - first + BLOCK_KV - 1) // BLOCK_KV, axis=0)


@triton.jit
def batch_attention_tile(
    task, event_ptr, control_ptr, epoch,
    counts_ptr, items_ptr, page_table_ptr, q_ptr, k_cache_ptr, v_cache_ptr,  # in
    parts_ptr, lse_ptr,  # out
    kv_head, part,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, NUM_PAGES: tl.constexpr,
    NUM_PARTS: tl.constexpr, MAX_TOKENS: tl.constexpr, MAX_ITEMS: tl.constexpr, SPLIT_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    d = tl.arange(0, BLOCK_DH)[None, :]
    rows = tl.arange(0, BLOCK_M)
    positions = tl.arange(0, BLOCK_KV)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    num_items = tl.load(counts_ptr)
    num_blocks = count_blocks(items_ptr, num_items, part, NUM_PARTS, MAX_ITEMS, SPLIT_TOKENS, BLOCK_KV)
    # A block is computed two iterations after its copies began. So its item is loaded again then, by a counter of its
    # own: what both halves of the loop used would be kept in registers meanwhile. Pages, too, are loaded an iteration
    # before the copies need them, and their item another one before.
    index = part
    block = 0
    item = load_item(items_ptr, index, num_items)
    first, end = positions_of(item[0], item[3], SPLIT_TOKENS)
    page = load_pages(first + positions, end, item[2], page_table_ptr, PAGE_SIZE, NUM_PAGES)
    to_copy = item
    block_to_copy = 0
    next_index, next_block, _ = block_after(item, index, block, NUM_PARTS, SPLIT_TOKENS, BLOCK_KV)
    following = load_item(items_ptr, next_index, num_items)
    m = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: the difference of two must be a number
    l = tl.zeros([BLOCK_M, BLOCK_KV], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DH], tl.float32)
    for _ in tl.range(0, num_blocks, num_stages=STAGES, disable_licm=True):
        first, end = positions_of(to_copy[0], to_copy[3], SPLIT_TOKENS)
        kv = first + block_to_copy * BLOCK_KV + positions
        row = (page * HKV + kv_head) * PAGE_SIZE + (kv.to(tl.uint32) % PAGE_SIZE).to(tl.int32)
        row = row.to(tl.int64)[:, None] * DH + d
        mask = (kv < end)[:, None] & (d < DH)
        k = tl.load(k_cache_ptr + row, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + row, mask=mask, other=0.0)
        at, position = item_rows(to_copy, rows, kv_head, H, GROUP)
        q = tl.load(q_ptr + at[:, None] * DH + d, mask=(position >= 0)[:, None] & (d < DH), other=0.0)
        _, block_to_copy, _ = block_after(to_copy, 0, block_to_copy, NUM_PARTS, SPLIT_TOKENS, BLOCK_KV)
        to_copy = load_item(items_ptr, next_index, num_items)
        first, end = positions_of(following[0], following[3], SPLIT_TOKENS)
        kv = first + next_block * BLOCK_KV + positions
        page = load_pages(kv, end, following[2], page_table_ptr, PAGE_SIZE, NUM_PAGES)
        next_index, next_block, _ = block_after(following, next_index, next_block, NUM_PARTS, SPLIT_TOKENS, BLOCK_KV)
        following = load_item(items_ptr, next_index, num_items)

        first, _ = positions_of(item[0], item[3], SPLIT_TOKENS)
        kv = first + block * BLOCK_KV + positions
        at, position = item_rows(item, rows, kv_head, H, GROUP)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(kv[None, :] <= position[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha[:, None] + p
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = m_new
        at += (item[0] >> 16) * (MAX_TOKENS * H)
        is_row = position >= first  # earlier tokens of the block may have nothing in the last split
        index, block, is_last = block_after(item, index, block, NUM_PARTS, SPLIT_TOKENS, BLOCK_KV)
        if is_last:
            total = tl.sum(l, axis=1)
            total = tl.where(total > 0, total, 1.0)
            result = (acc * (1.0 / total)[:, None]).to(parts_ptr.dtype.element_ty)
            tl.store(parts_ptr + at[:, None] * DH + d, result, mask=is_row[:, None] & (d < DH))
            tl.store(lse_ptr + at, m + log2(total, PORTABLE), mask=is_row)
        # and the next item begins
        m = tl.where(is_last, -1e30, m)
        l = tl.where(is_last, 0.0, l)
        acc = tl.where(is_last, 0.0, acc)
        item = load_item(items_ptr, index, num_items)
    signal(task, event_ptr, PORTABLE)


def block_tokens(num_q_heads: int, num_kv_heads: int) -> int:
    """Tokens of an item."""
    return max(1, BLOCK_M // (num_q_heads // num_kv_heads))


def block_positions(split_tokens: int, head_dim: int, itemsize: int) -> int:
    """BLOCK_KV: positions that are loaded at once, a whole split if it is that short."""
    return min(split_tokens, BLOCK_POSITIONS, BLOCK_BYTES // (next_power_of_2(head_dim) * itemsize))


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
            "MAX_TOKENS": max_tokens,
            "MAX_ITEMS": next_power_of_2(-(-items.dims[0] // num_parts)), "SPLIT_TOKENS": split_tokens,
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

"""Attention where weights come through the ring: each warp has blocks of its own, loaded as the tensor cores want them.

No warp waits for another until they merge what they have, in shared memory. A warp's block is 16 tokens or 32, and the
matrix instruction's [16, 16] @ [16, 8] is tokens by columns by heads for the scores, columns by tokens by heads for the
values: up to eight query heads per KV head. The columns of a head are in an order in which every lane loads 16 bytes at
once. attention.py has the other form, by tl.dot, which defines what this one does.
Source: arXiv:2205.14135; "Matrix Fragments for mma.m16n8k16" in NVIDIA's description of PTX.
"""

import triton
import triton.language as tl

from tri_mpk.ops.gemv import SQUARES_OFFSET, SUMS_OFFSET
from tri_mpk.ops.rotary import load_head, rotate_head
from tri_mpk.ops.warps import (
    LANES,
    WARPS,
    high_half,
    high_halves,
    lane_place,
    load_word,
    load_words,
    low_half,
    low_halves,
    multiply_add,
    over_tokens,
    pack_halves,
    read_float,
    read_pair,
    read_words,
    transpose,
    write_float,
    write_floats,
    write_half,
)
from tri_mpk.scheduler.device import wait

# Shared memory of a task, in bytes from SUMS_OFFSET on: the new q, k and v or else what each warp has, two heads of 128
# or four of 64 at a time; behind it maxima and sums [WARPS, 8] of all heads.
STATE_BYTES = tl.constexpr(16384)


@triton.jit
def load_keys(cache_ptr, row, num_rows, DH: tl.constexpr, TILES: tl.constexpr):
    """Words of TILES * 16 keys from row `row` of the cache on, as `attend` wants them; zeros from `num_rows` on.

    Lane (g, j) has columns 32 c + 8 j to 32 c + 8 j + 7 of the tokens 8 n + g.
    """
    warp, g, j = lane_place()
    ptr = cache_ptr + (row + g) * DH + 8 * j
    words = ()
    for n in tl.static_range(2 * TILES):
        for c in tl.static_range((DH + 31) // 32):
            wanted = (8 * n + g < num_rows) & (32 * c + 8 * j < DH)
            words = words + load_words(ptr + (8 * n * DH + 32 * c), wanted.to(tl.int32))
    return words


@triton.jit
def load_values(cache_ptr, row, num_rows, DH: tl.constexpr, TILES: tl.constexpr):
    """The same of values: lane (g, j) has columns 64 c + 8 g to 64 c + 8 g + 7 of the tokens 8 n + 2 j, + 1."""
    warp, g, j = lane_place()
    ptr = cache_ptr + (row + 2 * j) * DH + 8 * g
    words = ()
    for n in tl.static_range(2 * TILES):
        for odd in tl.static_range(2):
            for c in tl.static_range((DH + 63) // 64):
                wanted = (8 * n + 2 * j + odd < num_rows) & (64 * c + 8 * g < DH)
                words = words + load_words(ptr + ((8 * n + odd) * DH + 64 * c), wanted.to(tl.int32))
    return words


@triton.jit
def score(q_at, keys, num_rows, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """k q. Lane (g, j) has, per 16 tokens, those of token g with heads 2 j and 2 j + 1 and of token g + 8 with both.

    -inf from token `num_rows` on. `q_at`: lane (g, j)'s part of head g in shared memory, as `load_keys` has one.
    """
    CHUNKS: tl.constexpr = (DH + 31) // 32
    warp, g, j = lane_place()
    zero = tl.zeros([WARPS, LANES], tl.float32)
    scores = ()
    for _ in tl.static_range(4 * TILES):
        scores = scores + (zero,)
    for i in tl.static_range(2 * CHUNKS):
        q = read_pair(q_at + (i // 2 * 32 + i % 2 * 4) * 2)
        sums = ()
        for t in tl.static_range(TILES):
            k = keys[8 * t * CHUNKS + 2 * i :: 4 * CHUNKS]
            k_next = keys[8 * t * CHUNKS + 2 * i + 1 :: 4 * CHUNKS]
            sums = sums + multiply_add(scores[4 * t : 4 * t + 4], (k[0], k[1], k_next[0], k_next[1]), q, DTYPE)
        scores = sums
    masked = ()
    for i in tl.static_range(4 * TILES):
        masked = masked + (tl.where(8 * (i // 2) + g < num_rows, scores[i], float("-inf")),)
    return masked


@triton.jit
def soften(scores, m, l):
    """A step of the online softmax of two heads: (new maxima, new sums, what scales older values, exponentials)."""
    new_m = ()
    new_l = ()
    alpha = ()
    for e in tl.static_range(2):
        top = scores[e]
        for i in tl.static_range(2 + e, len(scores), 2):
            top = tl.maximum(top, scores[i])
        top = tl.maximum(m[e], over_tokens(top, "max"))
        new_m = new_m + (top,)
        alpha = alpha + (tl.exp2(m[e] - top),)
    p = ()
    for i in tl.static_range(len(scores)):
        p = p + (tl.exp2(scores[i] - new_m[i % 2]),)
    for e in tl.static_range(2):
        sum = l[e] * alpha[e]
        for i in tl.static_range(e, len(scores), 2):
            sum += p[i]
        new_l = new_l + (sum,)
    return new_m, new_l, alpha, p


@triton.jit
def accumulate(acc, alpha, p, values, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """acc * alpha + v p. Lane (g, j) has, in fours, the columns 64 c + 8 g + 2 w and + 1 of the heads 2 j and + 1."""
    CHUNKS: tl.constexpr = (DH + 63) // 64
    WORDS: tl.constexpr = 4 * CHUNKS  # of one token
    weights = ()
    for t in tl.static_range(TILES):
        weights = weights + (
            transpose(pack_halves(p[4 * t], p[4 * t + 1], DTYPE)),
            transpose(pack_halves(p[4 * t + 2], p[4 * t + 3], DTYPE)),
        )
    result = ()
    for w in tl.static_range(WORDS):
        c = (
            acc[4 * w] * alpha[0],
            acc[4 * w + 1] * alpha[1],
            acc[4 * w + 2] * alpha[0],
            acc[4 * w + 3] * alpha[1],
        )
        for t in tl.static_range(TILES):
            v = values[4 * t * WORDS + w :: WORDS]  # of the tokens 2 j, + 1, + 8, + 9
            a = (low_halves(v[0], v[1]), high_halves(v[0], v[1]), low_halves(v[2], v[3]), high_halves(v[2], v[3]))
            c = multiply_add(c, a, weights[2 * t : 2 * t + 2], DTYPE)
        result = result + c
    return result


@triton.jit
def attend(q_at, keys, values, num_rows, m, l, acc, DH: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr):
    """A warp's heads attend to TILES * 16 tokens, of which `num_rows` exist."""
    m, l, alpha, p = soften(score(q_at, keys, num_rows, DH, TILES, DTYPE), m, l)
    return m, l, accumulate(acc, alpha, p, values, DH, TILES, DTYPE)


@triton.jit
def merge_warps(
    smem, m, l, acc, parts_ptr, lse_ptr, head0,
    GROUP: tl.constexpr, DH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The part of a split and its lse from what each warp has, HEADS heads at a time."""
    PADDED: tl.constexpr = (DH + 63) // 64 * 64
    warp, g, j = lane_place()
    state = smem + SUMS_OFFSET
    sums = state + STATE_BYTES  # (maximum, sum) [WARPS, 8]
    write_floats(
        sums + (warp * 8 + 2 * j) * 8,
        m[0],
        over_tokens(l[0], "add"),
        m[1],
        over_tokens(l[1], "add"),
        (g == 0).to(tl.int32),
    )
    o = tl.arange(0, BLOCK)
    h = o // PADDED
    d = o % PADDED
    for first in tl.static_range(0, GROUP, HEADS):
        tl.debug_barrier()
        for e in tl.static_range(2):
            head = 2 * j + e - first
            wanted = ((head >= 0) & (head < HEADS)).to(tl.int32)
            at = state + ((warp * HEADS + head) * PADDED + 8 * g) * 4
            for c in tl.static_range(PADDED // 64):
                x = acc[16 * c + e :: 2]  # the columns 64 c + 8 g on
                write_floats(at + 256 * c, x[0], x[1], x[2], x[3], wanted)
                write_floats(at + 256 * c + 16, x[4], x[5], x[6], x[7], wanted)
        tl.debug_barrier()
        top = tl.full([BLOCK], -1e30, tl.float32)
        for w in tl.static_range(WARPS):
            top = tl.maximum(top, read_float(sums + (w * 8 + first + h) * 8))
        total = tl.zeros([BLOCK], tl.float32)
        out = tl.zeros([BLOCK], tl.float32)
        for w in tl.static_range(WARPS):
            at = sums + (w * 8 + first + h) * 8
            weight = tl.exp2(read_float(at) - top)
            total += weight * read_float(at + 4)
            out += weight * read_float(state + ((w * HEADS + h) * PADDED + d) * 4)
        mask = (first + h < GROUP) & (d < DH)
        tl.store(parts_ptr + (head0 + first + h) * DH + d, (out / total).to(parts_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + head0 + first + h, top + tl.log2(total), mask=mask & (d == 0))


@triton.jit
def norms_by_warps(smem, qkv_ptr, kv_head, H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, EPS: tl.constexpr):
    """Address of rsqrt(mean(x^2) + eps) of the KV head's query heads and, as number 8, of its new key: a warp each."""
    GROUP: tl.constexpr = H // HKV
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    warp = tl.arange(0, WARPS)[:, None] + tl.zeros([WARPS, LANES], tl.int32)
    lane = tl.zeros([WARPS, LANES], tl.int32) + tl.arange(0, LANES)[None, :]
    head = tl.where(warp < GROUP, kv_head * GROUP + warp, H + kv_head)
    squares = tl.zeros([WARPS, LANES], tl.float32)
    for first in tl.static_range(0, DH, 2 * LANES):
        wanted = ((warp < GROUP) | (warp == 8)) & (first + 2 * lane < DH)
        word = load_word(qkv_ptr + head * DH + first + 2 * lane, wanted.to(tl.int32))
        squares += low_half(word, DTYPE) * low_half(word, DTYPE) + high_half(word, DTYPE) * high_half(word, DTYPE)
    norms = smem + SQUARES_OFFSET
    write_float(norms + tl.arange(0, WARPS) * 4, tl.rsqrt(tl.sum(squares, axis=1) / DH + EPS))
    tl.debug_barrier()
    return norms


@triton.jit
def attend_by_warps(
    task, event_ptr, control_ptr, epoch, step, smem,
    qkv_ptr, q_gain_ptr, k_gain_ptr, cos_ptr, sin_ptr, page_table_ptr,
    k_cache_ptr, v_cache_ptr, parts_ptr, lse_ptr, kv_head, split, num_splits,
    H: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE_SIZE: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_DH: tl.constexpr, BLOCK_KV: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = H // HKV
    PADDED: tl.constexpr = (DH + 63) // 64 * 64
    TILES: tl.constexpr = BLOCK_KV // 16
    DTYPE: tl.constexpr = k_cache_ptr.dtype.element_ty
    warp, g, j = lane_place()
    d = tl.arange(0, BLOCK_DH)[None, :] + tl.zeros([BLOCK_H, BLOCK_DH], tl.int32)
    h = tl.arange(0, BLOCK_H)[:, None] + tl.zeros([BLOCK_H, BLOCK_DH], tl.int32)
    is_first = split == 0
    num_blocks = (step + BLOCK_KV - 1) // BLOCK_KV
    first = split * num_blocks // num_splits
    last = tl.where(split < num_splits, (split + 1) * num_blocks // num_splits, first)
    # nobody writes older rows of the cache in this step: the first blocks are on their way while we wait
    block = first + warp
    page = load_word(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, (block < last).to(tl.int32))
    row = (page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE
    num_rows = tl.where(block < last, step - block * BLOCK_KV, 0)
    keys = load_keys(k_cache_ptr, row, num_rows, DH, TILES)
    values = load_values(v_cache_ptr, row, num_rows, DH, TILES)
    new_page = tl.load(page_table_ptr + step // PAGE_SIZE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    if split < num_splits:
        # all loads before the first use of one: they are under way together
        cos_row = tl.load(cos_ptr + step * DH + d, mask=d < DH, other=0.0)
        sin_row = tl.load(sin_ptr + step * DH + d, mask=d < DH, other=0.0)
        q, q_partner = load_head(qkv_ptr, kv_head * GROUP, GROUP, BLOCK_H, DH, BLOCK_DH)
        # the new key and value are row 0 of a block as large: fewer registers than a row that all warps hold
        k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, is_first.to(tl.int32), BLOCK_H, DH, BLOCK_DH)
        is_new = (d < DH) & (h == 0) & is_first
        v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=is_new, other=0.0)
        q_rstd = 1.0
        k_rstd = 1.0
        if NORM:
            norms = norms_by_warps(smem, qkv_ptr, kv_head, H, HKV, DH, EPS)
            q_rstd = read_float(norms + h * 4)
            k_rstd = read_float(norms + BLOCK_H * 4 + h * 0)
        q = rotate_head(q, q_partner, q_rstd, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM)
        q *= SCALE * 1.4426950408889634  # log2(e)
        q_at = smem + SUMS_OFFSET
        write_half(q_at + (h * PADDED + d) * 2, q.to(DTYPE))
        k_at = q_at + 4096
        v_at = q_at + 8192
        if is_first:  # the new token
            k_new = rotate_head(k_new, k_partner, k_rstd, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM).to(DTYPE)
            v_new = v_new.to(DTYPE)
            new_row = ((new_page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + step % PAGE_SIZE) * DH
            tl.store(k_cache_ptr + new_row + d, k_new, mask=is_new)
            tl.store(v_cache_ptr + new_row + d, v_new, mask=is_new)
            write_half(k_at + (h * PADDED + d) * 2, k_new)
            write_half(v_at + (h * PADDED + d) * 2, v_new)
        tl.debug_barrier()
        q_at += (g * PADDED + 8 * j) * 2
        zero = tl.zeros([WARPS, LANES], tl.float32)
        m = (zero - 1e30, zero - 1e30)  # finite: the difference of two must be a number
        l = (zero, zero)
        acc = ()
        for _ in tl.static_range(PADDED // 4):
            acc = acc + (zero,)
        m, l, acc = attend(q_at, keys, values, num_rows, m, l, acc, DH, TILES, DTYPE)
        for _ in tl.range(1, (last - first + WARPS - 1) // WARPS, num_stages=1):
            block += WARPS
            page = load_word(page_table_ptr + block * BLOCK_KV // PAGE_SIZE, (block < last).to(tl.int32))
            row = (page.to(tl.int64) * HKV + kv_head) * PAGE_SIZE + block * BLOCK_KV % PAGE_SIZE
            num_rows = tl.where(block < last, step - block * BLOCK_KV, 0)
            scores = score(q_at, load_keys(k_cache_ptr, row, num_rows, DH, TILES), num_rows, DH, TILES, DTYPE)
            m, l, alpha, p = soften(scores, m, l)
            # There are sixteen warps, and not registers enough for keys and values at once: values only when the keys
            # are used. The maximum is always above that, but the compiler does not know.
            num_rows = tl.where(m[0] > -2e30, num_rows, 0)
            values = load_values(v_cache_ptr, row, num_rows, DH, TILES)
            acc = accumulate(acc, alpha, p, values, DH, TILES, DTYPE)
        if is_first:  # the new token: token 0 of a block of the first warp's
            new_keys = ()
            new_values = ()
            for n in tl.static_range(2):
                for c in tl.static_range((DH + 31) // 32):
                    wanted = (g == 0) & (n == 0)
                    new_keys = new_keys + read_words(k_at + (32 * c + 8 * j) * 2, wanted.to(tl.int32))
                for odd in tl.static_range(2):
                    for c in tl.static_range(PADDED // 64):
                        wanted = (j == 0) & (n + odd == 0) & (64 * c + 8 * g < DH)
                        new_values = new_values + read_words(v_at + (64 * c + 8 * g) * 2, wanted.to(tl.int32))
            m, l, acc = attend(q_at, new_keys, new_values, tl.where(warp == 0, 1, 0), m, l, acc, DH, 1, DTYPE)
        HEADS: tl.constexpr = 256 // PADDED
        merge_warps(smem, m, l, acc, parts_ptr, lse_ptr, split * H + kv_head * GROUP, GROUP, DH, HEADS, 256)

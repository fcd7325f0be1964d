"""Attention of one new token over a paged KV cache, split over the KV length.

qkv [(H + 2 Hkv) * Dh] read | q, k gain [Dh] read | cos, sin [max_seq_len, Dh] fp32 read
page_table [num_pages] int32 read
k, v cache [num_pages, Hkv, page_size, Dh] read and appended to | parts [S, H, Dh], lse [S, H] fp32 written
The new token's q and k are normalised (Qwen3) and rotated here. As many splits are active as there are SPLIT_TOKENS
older tokens, at least one and at most S; split s of n takes blocks s*b//n to (s+1)*b//n of the b blocks of older
tokens, as an online softmax in base 2. The first split also takes the new token and appends its k and v. A part is
what its tokens alone would give; lse is the logarithm (base 2) of its sum of exponentials, by which whoever reads the
parts weighs them. Older rows of the cache are of earlier steps, so they may be loaded before the wait.

One task = one KV head, one split. Where weights come through the ring, each warp has blocks of its own, which it loads
as the tensor cores want them and works off without the others; what the warps have is merged in shared memory at the
end. The other form is Triton's own tl.dot, and the definition of what the first one does.
Source: arXiv:2205.14135, 2311.01282 (flash decoding); transformers Qwen3Attention.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tri_mpk.ops.gemv import LANES, SUMS_OFFSET, WARPS, load_word, load_words, read_float, read_words
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task

# Shared memory of a task, in bytes from SUMS_OFFSET on: the new q, k and v or else what each warp has, two heads of 128
# or four of 64 at a time; behind it maxima and sums [WARPS, 8] of all heads.
STATE_BYTES = tl.constexpr(16384)


@triton.jit
def active_splits(step, NUM_SPLITS: tl.constexpr, SPLIT_TOKENS: tl.constexpr):
    """How many of the splits have tokens, when there are `step` older ones."""
    return tl.minimum(tl.maximum((step + SPLIT_TOKENS - 1) // SPLIT_TOKENS, 1), NUM_SPLITS)


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
    d = tl.arange(0, BLOCK_DH)[None, :] + tl.zeros(x.shape, tl.int32)  # as few elements per thread as x has
    x = x.to(tl.float32)
    x_partner = x_partner.to(tl.float32)
    if NORM:
        partner = tl.where(d < DH // 2, d + DH // 2, d - DH // 2)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / DH + EPS)[:, None]
        x *= rstd * tl.load(gain_ptr + d, mask=d < DH, other=0.0).to(tl.float32)
        x_partner *= rstd * tl.load(gain_ptr + partner, mask=d < DH, other=0.0).to(tl.float32)
    return x * cos_row + tl.where(d < DH // 2, -x_partner, x_partner) * sin_row


# ---- a warp at a time, on the tensor cores ----


@triton.jit
def write_half(address, x):
    """A 16-bit number to shared memory."""
    tl.inline_asm_elementwise(
        "{ .reg .b16 x; cvt.u16.u32 x, $2; st.shared.b16 [$1], x; mov.u32 $0, 0; }",
        "=r,r,r",
        [address, x.to(tl.int16, bitcast=True).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def write_floats(address, a, b, c, d, wanted):
    tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.s32 p, $6, 0; @p st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;
        }""",
        "=r,r,f,f,f,f,r",
        [address, a, b, c, d, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def max_over_tokens(x):
    """Of the eight lanes with one lane % 4."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 other;
        shfl.sync.bfly.b32 other, $1, 4, 31, 0xffffffff; max.f32 $0, $1, other;
        shfl.sync.bfly.b32 other, $0, 8, 31, 0xffffffff; max.f32 $0, $0, other;
        shfl.sync.bfly.b32 other, $0, 16, 31, 0xffffffff; max.f32 $0, $0, other;
        }""",
        "=&f,f",
        [x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def sum_over_tokens(x):
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 other;
        shfl.sync.bfly.b32 other, $1, 4, 31, 0xffffffff; add.f32 $0, $1, other;
        shfl.sync.bfly.b32 other, $0, 8, 31, 0xffffffff; add.f32 $0, $0, other;
        shfl.sync.bfly.b32 other, $0, 16, 31, 0xffffffff; add.f32 $0, $0, other;
        }""",
        "=&f,f",
        [x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def multiply_add(c, a, b, DTYPE: tl.constexpr):
    """[16, 16] @ [16, 8] of a warp, added to c (four numbers a lane; a are four words, b two)."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
            " {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
            [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
            " {$0, $1, $2, $3}, {$8, $9, $10, $11}, {$12, $13}, {$4, $5, $6, $7};",
            "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r",
            [c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )


@triton.jit
def transpose(word):
    """[8, 8] 16-bit numbers of a warp, two a lane."""
    return tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def read_pair(address):
    """8 bytes of shared memory as two words."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];",
        "=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def pack_halves(low, high, DTYPE: tl.constexpr):
    """Two fp32 numbers as one word of two 16-bit ones."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def low_halves(a, b):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def high_halves(a, b):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def lane_place():
    """[WARPS, LANES]: warp, lane // 4 and lane % 4, the g and j by which the tensor cores lay out matrices."""
    zero = tl.zeros([WARPS, LANES], tl.int32)
    warp = tl.arange(0, WARPS)[:, None] + zero
    lane = tl.arange(0, LANES)[None, :] + zero
    return warp, lane // 4, lane % 4


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
        top = tl.maximum(m[e], max_over_tokens(top))
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
        sums + (warp * 8 + 2 * j) * 8, m[0], sum_over_tokens(l[0]), m[1], sum_over_tokens(l[1]), (g == 0).to(tl.int32)
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
        q = rotate_head(q, q_partner, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS)
        q *= SCALE * 1.4426950408889634  # log2(e)
        q_at = smem + SUMS_OFFSET
        write_half(q_at + (h * PADDED + d) * 2, q.to(DTYPE))
        k_at = q_at + 4096
        v_at = q_at + 8192
        if is_first:  # the new token
            k_new = rotate_head(k_new, k_partner, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS).to(DTYPE)
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


# ---- all warps together, by tl.dot ----


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
        q = rotate_head(q, q_partner, q_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS)
        q *= SCALE * 1.4426950408889634  # log2(e)
        m = tl.full([BLOCK_H], -1e30, tl.float32)
        l = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DH], tl.float32)
        if is_first:  # the new token
            k_new, k_partner = load_head(qkv_ptr + H * DH, kv_head, 1, 1, DH, BLOCK_DH)
            v_new = tl.load(qkv_ptr + (H + HKV + kv_head) * DH + d, mask=d < DH, other=0.0)
            k_new = rotate_head(k_new, k_partner, k_gain_ptr, cos_row, sin_row, DH, BLOCK_DH, NORM, EPS)
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


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


ATTENTION = Op("attention", attention_tile, cut_attention, attention_torch)

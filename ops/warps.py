"""Work by warps: what tile functions use of PTX when a thread does its own part of a block's work.

A tensor [WARPS, LANES] has one element per thread of the block, that of row w and column l on lane l of warp w.
Shuffles and matrix instructions rely on it. It holds as long as no tl.load reads such a tensor: the compiler might
choose another order of threads for it (tests/test_aot.py looks). A parameter `wanted` is int32, 0 or 1 per thread.

Reductions are within a warp or through shared memory here. Triton's own, over several warps, loads under a predicate a
register that nothing has set before, which ptxas therefore keeps through the whole loop over tasks.
"""

import triton
import triton.language as tl

WARPS = tl.constexpr(16)
LANES = tl.constexpr(32)


@triton.jit
def thread_index():
    return tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def lane_place():
    """[WARPS, LANES]: warp, lane // 4 and lane % 4, the g and j by which the tensor cores lay out matrices."""
    zero = tl.zeros([WARPS, LANES], tl.int32)
    warp = tl.arange(0, WARPS)[:, None] + zero
    lane = tl.arange(0, LANES)[None, :] + zero
    return warp, lane // 4, lane % 4


# ---- memory ----


@triton.jit
def load_word(ptr, wanted):
    """4 bytes of global memory; zero where `wanted` is 0.

    Not tl.load, for which the compiler may choose another order of threads than [WARPS, LANES], for all that depends on
    it. Nothing of the work by warps would be right then.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0; @p ld.global.b32 $0, [$1]; }",
        "=&r,l,r",
        [ptr.to(tl.int64), wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_words(ptr, wanted):
    """16 bytes of global memory as four words; zeros where `wanted` is 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,l,r",
        [ptr.to(tl.int64), wanted],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_eight(ptr, wanted):
    """Eight elements from each pointer on, in fp32; zeros where `wanted` is 0."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    a, b, c, d = load_words(ptr, wanted)
    if tl.float32 == DTYPE:
        e, f, g, h = load_words(ptr + 4, wanted)
        return (
            a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True),
            c.to(tl.float32, bitcast=True), d.to(tl.float32, bitcast=True),
            e.to(tl.float32, bitcast=True), f.to(tl.float32, bitcast=True),
            g.to(tl.float32, bitcast=True), h.to(tl.float32, bitcast=True),
        )  # fmt: skip
    else:
        return (
            low_half(a, DTYPE), high_half(a, DTYPE), low_half(b, DTYPE), high_half(b, DTYPE),
            low_half(c, DTYPE), high_half(c, DTYPE), low_half(d, DTYPE), high_half(d, DTYPE),
        )  # fmt: skip


@triton.jit
def read_words(address, wanted):
    """16 bytes of shared memory as four words; zeros where `wanted` is 0."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
        @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];
        }""",
        "=&r,=&r,=&r,=&r,r,r",
        [address, wanted],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
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
def read_float(address):
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def write_float(address, x):
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,f", [address, x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def write_float_where(address, x, wanted):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.f32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,f,r",
        [address, x, wanted.to(tl.int32)],
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


# ---- numbers of 16 bits ----


@triton.jit
def low_half(word, DTYPE: tl.constexpr):
    """The first of two 16-bit numbers in a word, in fp32."""
    if tl.bfloat16 == DTYPE:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


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


# ---- a warp's lanes together ----


@triton.jit
def shuffle(x, MASK: tl.constexpr):
    """x of the lane whose number is this one's XOR MASK."""
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 31, 0xffffffff;",
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def over_tokens(x, WHAT: tl.constexpr):
    """The max or add of the eight lanes with one lane % 4."""
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .f32 other;
        shfl.sync.bfly.b32 other, $1, 4, 31, 0xffffffff; {WHAT}.f32 $0, $1, other;
        shfl.sync.bfly.b32 other, $0, 8, 31, 0xffffffff; {WHAT}.f32 $0, $0, other;
        shfl.sync.bfly.b32 other, $0, 16, 31, 0xffffffff; {WHAT}.f32 $0, $0, other;
        }}""",
        "=&f,f",
        [x],
        dtype=tl.float32,
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

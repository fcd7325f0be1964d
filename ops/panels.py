"""Products of many tokens on Hopper: panels of weights through a ring that runs ahead of the tasks, `wgmma` from there.

A panel is 64 columns of up to 64 rows of weights, or of 32 of each of two matrices: what one request of a tensor map
brings, in the order of bytes that `wgmma` reads (swizzled by 128 bytes). A slot of the ring has the panels of 128
columns, or of 256 where a task has no more than 32 rows at a time. Activations have a ring of their own, of 128 columns
of up to 64 tokens at a time; it begins with each task, behind its wait.

    warps 0 to 3    multiply: rows x tokens += slot x activations
    warp 4          asks for the weights that come PANEL_SLOTS slots after those that are being multiplied
    warp 5          asks for activations

What comes next may belong to the worker's next task, if that reads weights in this way, too: so the ring is full when
a task has done its waiting. Between such tasks no other shared memory of the compiler's is used but OTHER_BYTES, since
the rings lie where other ops have theirs. A task whose next one is of another kind asks for nothing further, and the
first of the kind fills the ring before its wait (`begin_panels`).

A block's sums lie in shared memory in the end, for `FINISH` as in batch_gemm.py, whose loops of plain loads do the same
for other GPUs, weights of 32 bits and short rows. K has one order, so a token's sums depend on nothing else.

No function with `wgmma` may be called where there are panels, all are inlined then (the generator does that): ptxas
would have each such instruction end before the next one begins, in the whole kernel. It does so, too, where registers
run out.

Shared memory: barriers and state, in bytes behind the descriptors:
    0 a slot is full, 64 it is empty, 128 and 256 the same of activations, 8 bytes each
    384 next slot, its phase, next place of activations, phases of all of these, 400 whether the ring is full
"""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.op import Machine, TensorHandle
from tri_mpk.scheduler.device import (
    DESCRIPTOR_BYTES,
    SHARED_BYTES,
    TASK_STREAM,
    await_fetch,
    int_field,
    shared_memory,
    task_word,
)
from tri_mpk.scheduler.graph import Address, PanelStream

PANEL_SLOTS = tl.constexpr(7)
PANEL_SLOT_BYTES = tl.constexpr(16384)
X_AT = tl.constexpr(114688)  # behind the slots
X_BYTES = tl.constexpr(65536)  # of all activations
X_SLOTS = tl.constexpr(16)  # at most
SUMS_AT = tl.constexpr(180224)  # of a block: 64 rows of
SUMS_PITCH = tl.constexpr(288)  # bytes: 64 fp32 and a gap, so that banks differ
RINGS_BYTES = tl.constexpr(198656)
OTHER_BYTES = tl.constexpr(30720)  # of the compiler's shared memory lie in front of the rings
PANEL_STATE_BYTES = tl.constexpr(512)
PANEL = tl.constexpr(64)  # columns
PANEL_TOKENS = tl.constexpr(64)  # at a time
FEW_ROWS = tl.constexpr(8)  # tokens that one request brings, if there are up to 16
MANY_ROWS = tl.constexpr(32)  # or more
TENSOR_MAP_BYTES = tl.constexpr(128)
SUMS = tl.constexpr(
    "{a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, "
    "a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26, a27, a28, a29, a30, a31}"
)
COPY = tl.constexpr("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint")


@triton.jit
def start_panels(smem):
    """Barriers and state, before the first task."""
    tl.inline_asm_elementwise(
        f"""{{
        .reg .pred p; .reg .u32 at, left;
        mov.u32 left, %tid.x; setp.ne.u32 p, left, 0; @p bra DONE;
        mov.u32 at, $1; mov.u32 left, {PANEL_SLOTS};
        WEIGHTS: mbarrier.init.shared::cta.b64 [at], 1; mbarrier.init.shared::cta.b64 [at + 64], 4;
        add.u32 at, at, 8; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra WEIGHTS;
        add.u32 at, $1, 128; mov.u32 left, {X_SLOTS};
        ACTIVATIONS: mbarrier.init.shared::cta.b64 [at], 1; mbarrier.init.shared::cta.b64 [at + 128], 4;
        add.u32 at, at, 8; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra ACTIVATIONS;
        st.shared.v4.b32 [$1 + 384], {{left, left, left, left}}; st.shared.b32 [$1 + 400], left;
        fence.mbarrier_init.release.cluster;
        DONE: bar.sync 0; mov.u32 $0, 0;
        }}""",
        "=r,r",
        [smem + SHARED_BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def rings_address():
    """Where the slots begin: a multiple of 1024, which the swizzle wants."""
    begin = tl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    return (begin + OTHER_BYTES + 1023) // 1024 * 1024


@triton.jit
def stream_words(task):
    """Of a task's weights: tensor map, second one or 0, first row, panels of a slot, bytes of a request; and whether
    the next task goes on with the ring: 0, 1, or 2 if only when there are no more than PANEL_TOKENS tokens.
    """
    shape = task_word(task, TASK_STREAM + 3, False)
    return (
        task_word(task, TASK_STREAM, False),
        task_word(task, TASK_STREAM + 1, False),
        int_field(task, TASK_STREAM + 2, False),
        (shape & 0xFF).to(tl.int32),
        (shape >> 8 & 0xFFFF).to(tl.int32),
        (shape >> 32).to(tl.int32),
    )


@triton.jit
def begin_panels(task, control_ptr, num_tokens, x_map_addr, PANELS: tl.constexpr):
    """Before a task's wait: fills the ring if it is empty. Returns what `multiply_panels` needs."""
    if PANELS:
        smem = shared_memory(control_ptr, False)
        if num_tokens > 0:
            first_map, second_map, row, panels, size, goes_on = stream_words(task)
            tl.inline_asm_elementwise(
                # Of the lanes of warp 4 each asks for one panel of a slot, if it has so many.
                f"""{{
                .reg .pred p, two, mine, lead; .reg .u32 tid, lane, slot, held, left, kb, m, at, into, bytes, step;
                .reg .u32 full, column, stride; .reg .u64 map, policy;
                ld.shared.b32 held, [$1 + 400]; setp.ne.u32 p, held, 0; @p bra DONE;
                fence.proxy.async; bar.sync 0;  // the compiler's code is done with this memory
                mov.u32 tid, %tid.x; shr.u32 m, tid, 5; setp.ne.u32 p, m, 4; @p bra DONE;
                and.b32 lane, tid, 31; setp.eq.u32 lead, lane, 0; ld.shared.b32 slot, [$1 + 384];
                setp.ne.u64 two, $4, 0; and.b32 m, lane, 1; shr.u32 kb, lane, 1; selp.u32 kb, kb, lane, two;
                selp.u32 m, m, 0, two; setp.lt.u32 mine, kb, $6;
                setp.ne.u32 p, m, 0; selp.b64 map, $4, $3, p;
                mul.lo.u32 bytes, $6, $7; shl.b32 at, bytes, 1; selp.u32 bytes, at, bytes, two;
                selp.u32 stride, 8192, $7, two; mul.lo.u32 at, kb, stride; shl.b32 m, m, 12; add.u32 at, at, m;
                add.u32 at, at, $2; shl.b32 column, kb, 6; shl.b32 step, $6, 6;
                createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
                mov.u32 left, {PANEL_SLOTS};
                NEXT: mad.lo.u32 full, slot, 8, $1; mad.lo.u32 into, slot, {PANEL_SLOT_BYTES}, at;
                @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], bytes;
                bar.warp.sync 0xffffffff;
                @mine {COPY} [into], [map, {{column, $5}}], [full], policy;
                add.u32 column, column, step;
                add.u32 slot, slot, 1; setp.eq.u32 p, slot, {PANEL_SLOTS}; selp.u32 slot, 0, slot, p;
                sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;
                DONE: mov.u32 $0, 0;
                }}""",
                "=r,r,r,l,l,r,r,r",
                [smem + SHARED_BYTES, rings_address(), first_map, second_map, row, panels, size],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        return (task, smem, x_map_addr, num_tokens)
    else:
        return ()


@triton.jit
def multiply_block(
    state, rings, stream, row, following, x_map, first_token, num_tokens, first, goes_on,
    STEPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One block of rows times some tokens: sums go to SUMS_AT. Asks for what follows in the ring, if it has a map.

    STEPS: of 128 columns. first: activations have to be asked for; goes_on: the next block wants the same ones.
    """
    MULTIPLY: tl.constexpr = f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{TYPE}.{TYPE}"
    # written out twice, not a loop: together with words of 32 bits 30 instructions less a step
    MULTIPLY_PANEL: tl.constexpr = f"""
        mov.b64 dw, {{w, upper}}; mov.b64 dx, {{x, upper}}; add.u32 w, w, 2; add.u32 x, x, 2;
        {MULTIPLY} {SUMS}, dw, dx, yes, 1, 1, 0, 0;
        mov.b64 dw, {{w, upper}}; mov.b64 dx, {{x, upper}}; add.u32 w, w, 2; add.u32 x, x, 2;
        {MULTIPLY} {SUMS}, dw, dx, yes, 1, 1, 0, 0;
        mov.b64 dw, {{w, upper}}; mov.b64 dx, {{x, upper}}; add.u32 w, w, 2; add.u32 x, x, 2;
        {MULTIPLY} {SUMS}, dw, dx, yes, 1, 1, 0, 0;
        mov.b64 dw, {{w, upper}}; mov.b64 dx, {{x, upper}};
        {MULTIPLY} {SUMS}, dw, dx, yes, 1, 1, 0, 0;"""
    return tl.inline_asm_elementwise(
        f"""{{
        .reg .pred p, q, two, mine, lead, many, yes; .reg .u64 dw, dx, map, map2, policy;
        .reg .u32 tid, warp, lane, slot, phase, xslot, xphase, i, j, k, sub, subs, slots, at, into, bytes, step, stride;
        .reg .u32 column, token, row, panels, size, full, m, used, xused, xn, xunit, xstride, xslots;
        .reg .u32 w, x, w0, x0, upper;
        .reg .f32 a<32>;
        mov.u32 tid, %tid.x; shr.u32 warp, tid, 5; and.b32 lane, tid, 31; setp.eq.u32 lead, lane, 0;
        setp.eq.u32 yes, tid, tid;
        bar.sync 0;  // the sums of the block before have been read
        ld.shared.v4.b32 {{slot, phase, xslot, xphase}}, [$1 + 384];
        setp.gt.u32 p, warp, 5; @p bra END;
        // steps of a slot, and requests for a panel of activations, are one or two: no division is needed
        shr.u32 subs, $6, 1; add.u32 slots, subs, {STEPS - 1}; sub.u32 k, subs, 1; shr.u32 slots, slots, k;
        // activations: requests for a panel, bytes of one, of a panel, and how many steps there is room for
        setp.gt.u32 many, $15, 16; selp.u32 xunit, 4096, 1024, many; selp.u32 k, 5, 3, many;
        sub.u32 xn, $15, 1; shr.u32 xn, xn, k; shl.b32 xstride, xunit, xn; add.u32 xn, xn, 1;
        selp.u32 xslots, {X_BYTES // 8192}, {X_BYTES // 2048}, many; sub.u32 m, xn, 1;
        shr.u32 xslots, xslots, m; min.u32 xslots, xslots, {X_SLOTS};
        min.u32 xslots, xslots, {STEPS};  // what is asked for belongs to this block or to the next one
        setp.eq.u32 p, warp, 4; @p bra WEIGHTS;
        setp.eq.u32 p, warp, 5; @p bra ACTIVATIONS;

        // warps 0 to 3. The lower words of descriptors are w and x, w0 and x0 for slot 0. ptxas moves each of them to
        // registers that `wgmma` takes, most of a step's instructions; adding up 64 bits would be a third more
        setp.ne.u64 two, $4, 0; selp.u32 stride, 8192, $7, two; shr.u32 stride, stride, 4; shr.u32 xstride, xstride, 4;
        shr.u32 w0, $2, 4; or.b32 w0, w0, 0x10000; add.u32 x0, w0, {X_AT // 16}; mov.u32 upper, 0x40000040;
        mov.f32 a0, 0f00000000; mov.f32 a1, a0; mov.f32 a2, a0; mov.f32 a3, a0; mov.f32 a4, a0; mov.f32 a5, a0;
        mov.f32 a6, a0; mov.f32 a7, a0; mov.f32 a8, a0; mov.f32 a9, a0; mov.f32 a10, a0; mov.f32 a11, a0;
        mov.f32 a12, a0; mov.f32 a13, a0; mov.f32 a14, a0; mov.f32 a15, a0;
        mov.f32 a16, a0; mov.f32 a17, a0; mov.f32 a18, a0; mov.f32 a19, a0; mov.f32 a20, a0; mov.f32 a21, a0;
        mov.f32 a22, a0; mov.f32 a23, a0; mov.f32 a24, a0; mov.f32 a25, a0; mov.f32 a26, a0; mov.f32 a27, a0;
        mov.f32 a28, a0; mov.f32 a29, a0; mov.f32 a30, a0; mov.f32 a31, a0;
        mov.u32 i, 0; mov.u32 sub, 0; mov.u32 used, 0; mov.u32 xused, 0;
        STEP:
        mad.lo.u32 full, slot, 8, $1;
        setp.ne.u32 p, sub, 0; @p bra SLOT;
        FULL: mbarrier.try_wait.parity.shared::cta.b64 p, [full], phase; @!p bra FULL;
        SLOT: mad.lo.u32 at, xslot, 8, $1; shr.u32 k, xphase, xslot; and.b32 k, k, 1;
        XFULL: mbarrier.try_wait.parity.shared::cta.b64 p, [at + 128], k; @!p bra XFULL;
        mad.lo.u32 w, slot, {PANEL_SLOT_BYTES // 16}, w0; shl.b32 k, sub, 1; mad.lo.u32 w, k, stride, w;
        shl.b32 k, xstride, 1; mad.lo.u32 x, xslot, k, x0;
        bar.warp.sync 0xffffffff;
        wgmma.fence.sync.aligned;
        {MULTIPLY_PANEL}
        add.u32 w, w, stride; sub.u32 w, w, 6; add.u32 x, x, xstride; sub.u32 x, x, 6;
        {MULTIPLY_PANEL}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;
        // what the step before has used is empty
        setp.ne.and.u32 p, xused, 0, lead; @p mbarrier.arrive.shared::cta.b64 _, [xused];
        setp.ne.and.u32 p, used, 0, lead; @p mbarrier.arrive.shared::cta.b64 _, [used];
        add.u32 xused, at, 256; mov.u32 used, 0;
        mov.u32 k, 1; shl.b32 k, k, xslot; xor.b32 xphase, xphase, k;
        add.u32 xslot, xslot, 1; setp.eq.u32 p, xslot, xslots; selp.u32 xslot, 0, xslot, p;
        add.u32 i, i, 1; add.u32 sub, sub, 1;
        setp.ne.u32 p, sub, subs; setp.ne.and.u32 p, i, {STEPS}, p; @p bra SAME;
        add.u32 used, full, 64; mov.u32 sub, 0;
        add.u32 slot, slot, 1; setp.eq.u32 p, slot, {PANEL_SLOTS}; selp.u32 slot, 0, slot, p;
        selp.u32 k, 1, 0, p; xor.b32 phase, phase, k;
        SAME: setp.ne.u32 p, i, {STEPS}; @p bra STEP;
        wgmma.wait_group.sync.aligned 0;
        @lead mbarrier.arrive.shared::cta.b64 _, [xused];
        setp.ne.and.u32 p, used, 0, lead; @p mbarrier.arrive.shared::cta.b64 _, [used];
        // rows lane / 4 and lane / 4 + 8 of the warp's 16, tokens 8 c + lane % 4 * 2 and the next
        shr.u32 at, lane, 2; mad.lo.u32 at, warp, 16, at; mul.lo.u32 at, at, {SUMS_PITCH};
        and.b32 k, lane, 3; mad.lo.u32 at, k, 8, at; add.u32 at, at, $2; add.u32 at, at, {SUMS_AT};
        st.shared.v2.f32 [at], {{a0, a1}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH}], {{a2, a3}};
        st.shared.v2.f32 [at + 32], {{a4, a5}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 32}], {{a6, a7}};
        st.shared.v2.f32 [at + 64], {{a8, a9}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 64}], {{a10, a11}};
        st.shared.v2.f32 [at + 96], {{a12, a13}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 96}], {{a14, a15}};
        setp.le.u32 p, $15, 32; @p bra END;
        st.shared.v2.f32 [at + 128], {{a16, a17}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 128}], {{a18, a19}};
        st.shared.v2.f32 [at + 160], {{a20, a21}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 160}], {{a22, a23}};
        st.shared.v2.f32 [at + 192], {{a24, a25}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 192}], {{a26, a27}};
        st.shared.v2.f32 [at + 224], {{a28, a29}}; st.shared.v2.f32 [at + {8 * SUMS_PITCH + 224}], {{a30, a31}};
        bra END;

        WEIGHTS:  // warp 4: of this block or of what follows, as soon as a slot is empty
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
        mov.u32 i, 0;
        ASK: add.u32 j, i, {PANEL_SLOTS}; setp.lt.u32 q, j, slots; sub.u32 k, j, slots; selp.u32 j, j, k, q;
        selp.b64 map, $3, $8, q; selp.b64 map2, $4, $9, q; selp.u32 row, $5, $10, q;
        selp.u32 panels, $6, $11, q; selp.u32 size, $7, $12, q;
        setp.eq.u64 p, map, 0; @p bra END;
        setp.ne.u64 two, map2, 0; and.b32 m, lane, 1; shr.u32 k, lane, 1; selp.u32 k, k, lane, two;
        selp.u32 m, m, 0, two; setp.lt.u32 mine, k, panels; setp.ne.u32 p, m, 0; selp.b64 map, map2, map, p;
        mul.lo.u32 bytes, panels, size; shl.b32 step, bytes, 1; selp.u32 bytes, step, bytes, two;
        selp.u32 stride, 8192, size, two; mul.lo.u32 at, k, stride; shl.b32 m, m, 12; add.u32 at, at, m;
        mad.lo.u32 column, j, panels, k; shl.b32 column, column, 6;
        mad.lo.u32 into, slot, {PANEL_SLOT_BYTES}, at; add.u32 into, into, $2; mad.lo.u32 full, slot, 8, $1;
        EMPTY: mbarrier.try_wait.parity.shared::cta.b64 p, [full + 64], phase; @!p bra EMPTY;
        @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], bytes;
        bar.warp.sync 0xffffffff;
        @mine {COPY} [into], [map, {{column, row}}], [full], policy;
        add.u32 slot, slot, 1; setp.eq.u32 p, slot, {PANEL_SLOTS}; selp.u32 slot, 0, slot, p;
        selp.u32 k, 1, 0, p; xor.b32 phase, phase, k;
        add.u32 i, i, 1; setp.ne.u32 p, i, slots; @p bra ASK;
        bra END;

        ACTIVATIONS:  // warp 5: lane l asks for panel l / xn of a step, and some of the tokens
        fence.proxy.async;  // what other workers have written is read by the copy engine
        createpolicy.fractional.L2::evict_last.b64 policy, 1.0;
        add.u64 map, $13, {TENSOR_MAP_BYTES}; selp.b64 map, map, $13, many;
        shl.b32 k, xn, 1; setp.lt.u32 mine, lane, k; mul.lo.u32 bytes, k, xunit;
        sub.u32 m, xn, 1; shr.u32 k, lane, m; and.b32 token, lane, m;
        mul.lo.u32 at, token, xunit; mad.lo.u32 at, k, xstride, at;
        add.u32 at, at, $2; add.u32 at, at, {X_AT}; shl.b32 column, k, 6;
        selp.u32 k, {MANY_ROWS}, {FEW_ROWS}, many; mad.lo.u32 token, token, k, $14;
        // i counts steps that are being multiplied, from -xslots on if none has been asked for
        mov.u32 i, 0; mov.u32 j, xslots; setp.eq.u32 p, $16, 0; @p bra XASK;
        sub.u32 i, i, xslots; mov.u32 j, 0;
        XASK: setp.lt.u32 q, j, {STEPS}; sub.u32 k, j, {STEPS}; selp.u32 k, j, k, q;
        setp.ne.or.u32 p, $17, 0, q; @!p bra XNONE;
        mad.lo.u32 full, xslot, 8, $1; mad.lo.u32 into, xslot, bytes, at; shl.b32 k, k, 7; add.u32 k, k, column;
        setp.lt.s32 p, i, 0; @p bra XEMPTY;
        shr.u32 m, xphase, xslot; and.b32 m, m, 1;
        XUSED: mbarrier.try_wait.parity.shared::cta.b64 p, [full + 256], m; @!p bra XUSED;
        mov.u32 m, 1; shl.b32 m, m, xslot; xor.b32 xphase, xphase, m;
        XEMPTY:
        @lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [full + 128], bytes;
        bar.warp.sync 0xffffffff;
        @mine {COPY} [into], [map, {{k, token}}], [full + 128], policy;
        XNONE: add.u32 xslot, xslot, 1; setp.eq.u32 p, xslot, xslots; selp.u32 xslot, 0, xslot, p;
        add.u32 i, i, 1; add.u32 j, j, 1; setp.lt.s32 p, i, {STEPS}; @p bra XASK;

        END: bar.sync 0;
        setp.ne.u32 p, tid, 0; @p bra DONE;
        setp.ne.u64 q, $8, 0; selp.u32 k, 1, 0, q; st.shared.b32 [$1 + 400], k;
        setp.eq.u32 q, $17, 0; selp.u32 xslot, 0, xslot, q;  // the next task begins in front, with as many as it likes
        st.shared.v4.b32 [$1 + 384], {{slot, phase, xslot, xphase}};
        DONE: mov.u32 $0, 0;
        }}""",
        "=r,r,r,l,l,r,r,r,l,l,r,r,r,l,r,r,r,r",
        [
            state, rings, stream[0], stream[1], row, stream[3], stream[4],
            following[0], following[1], following[2], following[3], following[4],
            x_map, first_token, num_tokens, first, goes_on,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def read_sums(address):
    """fp32 of shared memory. Pure, so that the compiler is free in who reads what: `address` must hang on the barrier
    behind which they are there.
    """
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def multiply_panels(
    ring, first_token, num_rows, block_rows, is_token, result, args,
    FINISH: tl.constexpr, CONSTANTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """`multiply_rows` of batch_gemm.py for up to PANEL_TOKENS tokens; `block_rows`: of the task's blocks."""
    task, smem, x_map, num_tokens = ring
    TYPE: tl.constexpr = "bf16" if tl.bfloat16 == WEIGHT else "f16"
    STEPS: tl.constexpr = (K + 2 * PANEL - 1) // (2 * PANEL)
    await_fetch(smem, False)  # the next descriptor is there
    stream = stream_words(task)
    later = stream_words(2 * smem + DESCRIPTOR_BYTES - task)
    rings = rings_address()
    row = tl.arange(0, BLOCK)
    place = tl.arange(0, ROWS)[:, None] * SUMS_PITCH + tl.arange(0, PANEL_TOKENS)[None, :] * 4
    num_blocks = (num_rows + block_rows - 1) // block_rows
    tokens_left = num_tokens - first_token
    goes_on = (stream[5] == 1) | ((stream[5] == 2) & (num_tokens <= PANEL_TOKENS))
    for block in tl.range(0, num_blocks, num_stages=1, disable_licm=True):
        done = block * block_rows
        row0 = stream[2] + done
        is_last = block + 1 == num_blocks
        ends = is_last & (tokens_left <= PANEL_TOKENS)  # else other tokens want the same rows again
        following = (
            tl.where(ends, later[0] * goes_on.to(tl.int64), stream[0]),
            tl.where(ends, later[1], stream[1]),
            tl.where(ends, later[2], tl.where(is_last, stream[2], row0 + block_rows)),
            tl.where(ends, later[3], stream[3]),
            tl.where(ends, later[4], stream[4]),
        )
        there = multiply_block(
            smem + SHARED_BYTES, rings, stream, row0, following, x_map, first_token,
            tl.minimum(tokens_left, PANEL_TOKENS), (block == 0).to(tl.int32), 1 - is_last.to(tl.int32), STEPS, TYPE,
        )  # fmt: skip
        y = read_sums(rings + SUMS_AT + there + place)
        result = FINISH(y, row0 + row, row < num_rows - done, is_token, result, args, CONSTANTS)
    return result


ROWS_OF_TWO = 32  # of each of two matrices


def panel_streams(
    machine: Machine,
    weight: TensorHandle,
    ranges: list[tuple[int, int]],
    x: TensorHandle,
    second: TensorHandle | None = None,
    few_only: bool = False,
) -> tuple[list[PanelStream | None], Address | None]:
    """Where weights come in panels: what the tasks that multiply these ranges of rows of `weight` (and of `second`) and
    x [T, K] bring through the ring, and the first of two neighbouring tensor maps of x. Else Nones.

    They do where rows are aligned as tensor maps want it, and long enough that the ring never is two blocks ahead.
    `few_only`: in steps of up to PANEL_TOKENS tokens only.
    """
    _, k = weight.dims
    most = max(hi - lo for lo, hi in ranges)
    limit = ROWS_OF_TWO if second or most <= ROWS_OF_TWO else 2 * ROWS_OF_TWO
    block_rows = max(  # of any task, as `even_block`
        -(-(hi - lo) // -(-(hi - lo) // limit)) for lo, hi in ranges
    )
    shortest = PANEL_SLOTS.value * PANEL.value  # columns, for each panel of a slot
    panels = 2 if second or block_rows > ROWS_OF_TWO or k < 4 * shortest else 4
    aligned = weight.dtype.itemsize == 2 and k % 8 == 0
    if machine.maps is None or not aligned or k < panels * shortest:
        return [None] * len(ranges), None
    box = ROWS_OF_TWO if second else -(-block_rows // 8) * 8  # the swizzle repeats after eight rows
    first, *more = (machine.maps.of(tensor, *weight.dims, box) for tensor in (weight, second) if tensor)
    streams = [
        PanelStream(first, more[0] if more else None, lo, panels, box * PANEL.value * 2, few_only) for lo, _ in ranges
    ]
    x_map, _ = (machine.maps.of(x, x.numel // k, k, rows.value) for rows in (FEW_ROWS, MANY_ROWS))
    return streams, x_map

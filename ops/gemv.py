"""Streaming a weight matrix: what all matrix-vector ops share.

A task's rows are consecutive in memory. A worker owns a ring of slots in shared memory and has the bulk copy engine
fill each with a few whole rows in one request. What a slot is refilled with is always what comes next in the worker's
streams, whichever task that belongs to: the weight stream runs on while a worker waits for an event.

    slot        0        1        2        3
    holds       read     [now]    ready    on its way
    next        slot 0 is refilled; its rows may be the first of the worker's next task

A slot is refilled when all warps have read it and one slot more: the one before the slot to read next is empty.

`ring` is the state of that: shared memory, the slot to read next, and the cursor, which is the position of the next
rows to request. The cursor walks the worker's streams by itself.

Where a worker waits so long that its ring is full before the wait is over, L2 is the next place for weights to come to
(`prefetch_rows`): memory would idle otherwise.

Each of the 16 warps has a 16th of the columns of all R rows of a slot, the same in every slot, and cuts them into
S = 16 / R segments, so that rows and segments together are the 16 rows of the tensor cores' A [16, 16] @ B [16, 8].
The columns of B are x at those segments; of the product, only what A's row and B's column have of one segment counts.

    R = 4    A's row 4 r + s: row r, segment s of 4    B's columns 2 s and 2 s + 1: x at segment s

If R is no power of two, S is as for the next one, and A's last rows are zeros.

x is rounded to 16 bits twice, what is left after the first time once more, and both products are added: 16 bits of it
count, and products and sums are exact as in fp32. Where S <= 4 both are columns of one B, otherwise there are two. A
thread holds its part of B in registers for the whole task. Which column of a segment is which row of B is free: each
lane loads 8 in a row.

Warps leave their sums in shared memory; after one barrier they are added up, row by row, in the order of the columns.

RING is the size of a slot in bytes. Without a ring (the interpreter, GPUs without bulk copies, weights that are not 16
bits wide or not aligned to 16 bytes) the same functions load [BLOCK_N, BLOCK_K] tiles directly: right on any machine,
and the definition of what the ring does.
"""

import triton
import triton.language as tl

from tri_mpk.ops.op import Machine, next_power_of_2
from tri_mpk.ops.warps import (
    LANES,
    WARPS,
    high_half,
    lane_place,
    load_eight,
    low_half,
    multiply_add,
    pack_halves,
    read_float,
    read_words,
    shuffle,
    thread_index,
    write_float,
    write_float_where,
)
from tri_mpk.scheduler.device import (
    CONTROL_RING_SLOTS,
    TASK_STREAM,
    TASK_STREAM_INDEX,
    TASK_WAIT,
    TASK_WAIT_COUNT,
    int_field,
    task_word,
)

MAX_SLOTS = tl.constexpr(16)
MAX_MATRICES = tl.constexpr(4)  # that one prefetch reaches into
# Shared memory of ours, in bytes: task descriptors (scheduler/device.py), two barriers of 8 per slot (full, and 128 on,
# empty), sums of squares, the pieces that are prefetched (two barriers and how many pieces there have been), row sums
# (or what attention keeps there), the slots, where prefetched bytes go. The worker's streams lie in front of all that,
# the first one last.
BARRIERS_OFFSET = tl.constexpr(512)
SQUARES_OFFSET = tl.constexpr(768)
PIECES_OFFSET = tl.constexpr(832)
SUMS_OFFSET = tl.constexpr(1024)
SUMS_ROWS = tl.constexpr(256)  # per warp
SUMS_BYTES = tl.constexpr(16384)
RING_OFFSET = tl.constexpr(19456)
STREAM_BYTES = tl.constexpr(32)
SCRATCH_BYTES = tl.constexpr(4096)


# ---- the ring ----


@triton.jit
def read_stream(smem, stream):
    """The cursor at the start of the worker's stream number `stream`: (stream, address, bytes left, second, slot)."""
    start, second, num_bytes, slot_bytes = tl.inline_asm_elementwise(
        "ld.shared.v2.b64 {$0, $1}, [$4]; ld.shared.v2.b32 {$2, $3}, [$4 + 16];",
        "=l,=l,=r,=r,r",
        [smem - (stream + 1) * STREAM_BYTES],
        dtype=(tl.int64, tl.int64, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )
    return stream, start, num_bytes, second, slot_bytes


@triton.jit
def stream_word(smem, stream, offset):
    """Of a stream: its bytes (per matrix) at 16, the stream that follows at 24."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];",
        "=r,r",
        [smem - (stream + 1) * STREAM_BYTES + offset],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def start_ring(queue_ptr, num_tasks, control_ptr, smem, TASK_WORDS: tl.constexpr, RING: tl.constexpr):
    """Notes which weights this worker reads, in order, and requests the first of them."""
    if RING:
        slots = tl.load(control_ptr + CONTROL_RING_SLOTS).to(tl.int32)
        num_streams = (tl.load(queue_ptr + TASK_STREAM_INDEX) >> 32).to(tl.int32)
        for first in tl.range(0, num_tasks, WARPS * LANES, num_stages=1):
            task = first + tl.arange(0, WARPS * LANES)
            task_ptr = queue_ptr + task.to(tl.int64) * TASK_WORDS
            mask = task < num_tasks
            stream = tl.load(task_ptr + TASK_STREAM_INDEX, mask=mask, other=-1).to(tl.int32)
            following = tl.where(stream + 1 == num_streams, 0, stream + 1)  # behind the last one: the next step
            tl.inline_asm_elementwise(
                """{
                .reg .pred p; .reg .u32 at; .reg .b32 low, low2;
                setp.lt.s32 p, $2, 0; @p bra DONE;
                mad.lo.s32 at, $2, -32, $1; cvt.u32.u64 low, $5; cvt.u32.u64 low2, $6;
                st.shared.v2.b64 [at], {$3, $4}; st.shared.v4.b32 [at + 16], {low, low2, $7, 0};
                DONE: mov.u32 $0, 0;
                }""",
                "=r,r,r,l,l,l,l,r",
                [
                    smem - STREAM_BYTES,
                    stream,
                    tl.load(task_ptr + TASK_STREAM, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 1, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 2, mask=mask, other=0),
                    tl.load(task_ptr + TASK_STREAM + 3, mask=mask, other=0),
                    following,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 at, left;
            setp.ne.u32 p, $2, 0; @p bra DONE;
            mov.u32 at, $1; mov.u32 left, 16;
            NEXT: mbarrier.init.shared::cta.b64 [at], 1; mbarrier.init.shared::cta.b64 [at + 128], 16;
            add.u32 at, at, 8; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;
            mbarrier.init.shared::cta.b64 [$1 + 320], 1; mbarrier.init.shared::cta.b64 [$1 + 328], 1;
            st.shared.b32 [$1 + 336], 0;
            fence.mbarrier_init.release.cluster;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }""",
            "=r,r,r",
            [smem + BARRIERS_OFFSET, thread_index()],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        zero = slots * 0
        if num_streams > 0:
            cursor = read_stream(smem, zero)
            for slot in tl.range(0, slots - 1, num_stages=1):  # a fresh barrier counts as empty
                cursor = request_rows(smem, slot, 1, cursor, RING)
        else:
            slots = zero  # nothing is on its way, and nothing ever will be
            cursor = (zero, zero.to(tl.int64), zero, zero.to(tl.int64), zero)
        return (smem, slots, zero, zero, cursor)
    else:
        return 0


@triton.jit
def request_rows(smem, slot, phase, cursor, RING: tl.constexpr):
    """Copies the rows at the cursor into a slot, once all warps have read it, and moves the cursor on."""
    stream, addr, left, second, slot_bytes = cursor
    tl.inline_asm_elementwise(
        # One thread: lane 0 of the warp whose number the slot has, so that they take turns.
        """{
        .reg .pred p; .reg .u64 policy;
        setp.ne.u32 p, $7, $1; @p bra DONE;
        POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [$2 + 128], $3; @!p bra POLL;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], $6;
        setp.eq.u32 p, $6, 0; @p bra DONE;
        createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$4], [$5], $6, [$2], policy;
        DONE: mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r,l,r,r",
        [
            slot * LANES,
            smem + BARRIERS_OFFSET + slot * 8,
            phase,
            smem + RING_OFFSET + slot * RING,
            addr,
            tl.minimum(left, slot_bytes),
            thread_index(),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    return advance(smem, cursor, slot_bytes)


@triton.jit
def advance(smem, cursor, num_bytes):
    """The cursor so many bytes on, but not beyond the end of a matrix."""
    stream, addr, left, second, slot_bytes = cursor
    addr += num_bytes
    left -= num_bytes
    if left <= 0:
        if second != 0:
            addr = second
            second = second * 0
            left = stream_word(smem, stream, 16)
        else:
            stream, addr, left, second, slot_bytes = read_stream(smem, stream_word(smem, stream, 24))
    return (stream, addr, left, second, slot_bytes)


@triton.jit
def await_slot(smem, slot, phase):
    """Until the slot is full."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra POLL;
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [smem + BARRIERS_OFFSET + slot * 8, phase],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def release_slot(ring, RING: tl.constexpr):
    """This warp has read the current slot. The ring moves on, and the slot before is refilled: all warps may have read
    that one.
    """
    smem, slots, slot, phase, cursor = ring
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        bar.warp.sync 0xffffffff;
        setp.eq.u32 p, $2, 0;
        @p mbarrier.arrive.shared::cta.b64 _, [$1 + 128];
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [smem + BARRIERS_OFFSET + slot * 8, thread_index() % LANES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    slot += 1
    if slot == slots:
        slot = slots * 0
        phase ^= 1
    older = slot - 2
    older_phase = phase
    if older < 0:
        older += slots
        older_phase = phase ^ 1
    cursor = request_rows(smem, older, older_phase, cursor, RING)
    return (smem, slots, slot, phase, cursor)


@triton.jit
def skip_rows(ring, num_rows, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """Leaves out the weights of the present task, of which as many slots as the ring reaches are on their way."""
    if RING:
        smem, slots, slot, phase, cursor = ring
        num_slots = (num_rows + SLOT_ROWS - 1) // SLOT_ROWS
        reach = slots - 1
        if num_slots > reach:  # the cursor has not left them
            cursor = read_stream(smem, stream_word(smem, cursor[0], 24))
            ring = (smem, slots, slot, phase, cursor)
        for _ in tl.range(0, tl.minimum(num_slots, reach), num_stages=1):
            await_slot(smem, ring[2], ring[3])
            ring = release_slot(ring, RING)
    return ring


@triton.jit
def drain_ring(ring, RING: tl.constexpr):
    """Until nothing is on its way: a program may not end while copies into its shared memory run."""
    if RING:
        smem, slots, slot, phase, cursor = ring
        for _ in tl.range(0, slots - 1, num_stages=1):
            await_slot(smem, slot, phase)
            slot += 1
            if slot == slots:
                slot = slots * 0
                phase ^= 1
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 piece, left, at, x;
            setp.ne.u32 p, $2, 480; @p bra DONE;
            ld.shared.b32 piece, [$1 + 16]; mov.u32 left, 2;
            NEXT: and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 x, piece, 1, 1; xor.b32 x, x, 1;
            POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [at], x; @!p bra POLL;
            add.u32 piece, piece, 1; sub.u32 left, left, 1; setp.ne.u32 p, left, 0; @p bra NEXT;
            DONE: mov.u32 $0, 0;
            }""",
            "=r,r,r",
            [smem + PIECES_OFFSET, thread_index()],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# ---- weights into L2 ----


@triton.jit
def prefetch_rows(task, event_ptr, epoch, ring, PORTABLE: tl.constexpr, RING: tl.constexpr, PREFETCH: tl.constexpr):
    """Has L2 fetch what follows in the stream, PREFETCH bytes at most, until the task's event has fired.

    One thread copies pieces of 32 KiB to where nobody reads them, two at a time: with more on their way, whatever else
    is loaded meanwhile waits behind them. Instructions that only prefetch are hints; an H200 drops most of so many.
    """
    if RING and PREFETCH > 0:
        smem, slots, slot, phase, cursor = ring
        count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
        if is_prefetcher(count):
            counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
            wanted = slots * 0 + PREFETCH
            for _ in tl.range(0, tl.minimum(slots, MAX_MATRICES), num_stages=1):  # not known: not unrolled
                if wanted > 0:
                    num_bytes = tl.minimum(cursor[2], wanted)
                    fired = copy_pieces(
                        smem, smem + RING_OFFSET + slots * RING, cursor[1], num_bytes, counter_ptr, epoch * count
                    )
                    wanted = tl.where(fired != 0, 0, wanted - num_bytes)
                    cursor = advance(smem, cursor, num_bytes)


@triton.jit
def is_prefetcher(count):
    """In lane 0 of the last warp, for the first warp polls, if there is anything to wait for."""
    return (
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 tid; mov.u32 tid, %tid.x; setp.eq.u32 p, tid, 480; selp.b32 $0, $1, 0, p; }",
            "=r,r",
            [count],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        > 0
    )


@triton.jit
def copy_pieces(smem, scratch, addr, num_bytes, counter_ptr, count):
    """1 as soon as the counter has come to `count`, 0 if all bytes are requested before."""
    return tl.inline_asm_elementwise(
        # Piece i has barrier i % 2; it is requested in parts as large as the scratch area.
        """{
        .reg .pred p; .reg .s32 left, piece, size, part, x; .reg .u32 at; .reg .u64 from, step;
        ld.shared.b32 piece, [$1 + 16]; mov.s32 left, $4; mov.u64 from, $3;
        NEXT: setp.lt.s32 p, left, 1; @p bra ALL;
        ld.relaxed.gpu.global.s32 x, [$5]; sub.s32 x, x, $6; setp.ge.s32 p, x, 0; @p bra FIRED;
        and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 x, piece, 1, 1; xor.b32 x, x, 1;
        mbarrier.test_wait.parity.shared::cta.b64 p, [at], x; @!p bra NEXT;
        min.s32 size, left, 32768; sub.s32 left, left, size; add.s32 piece, piece, 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [at], size;
        PART: min.s32 part, size, 4096;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [from], part, [at];
        cvt.u64.u32 step, part; add.u64 from, from, step; sub.s32 size, size, part;
        setp.gt.s32 p, size, 0; @p bra PART; bra NEXT;
        FIRED: mov.s32 $0, 1; bra DONE;
        ALL: mov.s32 $0, 0;
        DONE: st.shared.b32 [$1 + 16], piece;
        }""",
        "=&r,r,r,l,r,l,r",
        [smem + PIECES_OFFSET, scratch, addr, num_bytes, counter_ptr.to(tl.int64), count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# ---- one task ----


@triton.constexpr_function
def segments_of(slot_rows):
    """Into how many segments a warp cuts the columns of each of so many rows. A's rows are 16, whatever they hold."""
    return 16 >> (slot_rows - 1).bit_length()


@triton.jit
def segment_columns(variant, block: tl.constexpr, K: tl.constexpr, SLOT_ROWS: tl.constexpr):
    """[WARPS, LANES]: the first of the 8 columns that a lane has of 32, and whether there are any.

    `variant`: the lane's segment of its warp's columns. Odd ones take pairs of blocks in the other order, so that lanes
    that read at the same time find their words in other banks.
    """
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    COLS: tl.constexpr = (K + 128 * SEGMENTS - 1) // (128 * SEGMENTS) * 8
    warp, g, j = lane_place()
    other: tl.constexpr = 1 if (COLS + 31) // 32 % 2 == 0 else 0  # a block without a partner stays where it is
    within = 32 * (block ^ (variant % 2 * other)) + 8 * j
    col = (warp * SEGMENTS + variant % SEGMENTS) * COLS + within
    return col, (within < COLS) & (col < K)


@triton.jit
def own_columns(part: tl.constexpr, K: tl.constexpr, SLOT_ROWS: tl.constexpr):
    """`segment_columns` of part `part` of what a thread has of x, as B wants it: its column is the lane's g."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
    warp, g, j = lane_place()
    if SEGMENTS >= 8:
        variant = g + part // BLOCKS * 8
    elif SEGMENTS == 4:
        variant = g // 2
    else:
        variant = g // 2 % 2
    return segment_columns(variant, part % BLOCKS, K, SLOT_ROWS)


@triton.jit
def load_segment(ptr, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """A thread's part of a vector [K] in fp32 registers. A gain is loaded so before the wait, activations after it."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        PARTS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS) * (2 if SEGMENTS == 16 else 1)
        values = ()
        for part in tl.static_range(PARTS):
            col, wanted = own_columns(part, K, SLOT_ROWS)
            values = values + load_eight(ptr + col, wanted.to(tl.int32))
        return values
    else:
        return ()


@triton.jit
def scale_segment(ring, x, gain, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """x * gain, part by part; leaves the sums of x^2 of all warps' columns in shared memory."""
    if RING:
        scaled = ()
        squares = tl.zeros([WARPS, LANES], tl.float32)
        for i in tl.static_range(len(x)):
            squares += x[i] * x[i]
            scaled = scaled + (x[i] * gain[i],)
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        if SEGMENTS < 8:  # so many lanes have the same columns
            squares *= SEGMENTS / 8.0
        write_float(ring[0] + SQUARES_OFFSET + tl.arange(0, WARPS) * 4, tl.sum(squares, axis=1))
        return scaled
    else:
        return ()


@triton.jit
def split_segment(x, SLOT_ROWS: tl.constexpr, WEIGHT: tl.constexpr):
    """B's words, four per part: those of x rounded and those of the rest; of one B for both, what column g is of."""
    UNIT: tl.constexpr = 1.0 if tl.bfloat16 == WEIGHT else 16.0  # float16 ends at 65504: see `multiply_slot`
    warp, g, j = lane_place()
    rounded = ()
    rest = ()
    for i in tl.static_range(0, len(x), 2):
        a = x[i] / UNIT
        b = x[i + 1] / UNIT
        word = pack_halves(a, b, WEIGHT)
        more = pack_halves(a - low_half(word, WEIGHT), b - high_half(word, WEIGHT), WEIGHT)
        if segments_of(SLOT_ROWS) <= 4:
            word = tl.where(g % 2 == 0, word, more)
        rounded = rounded + (word,)
        rest = rest + (more,)
    return rounded, rest


@triton.jit
def multiply_slot(words, rounded, rest, SLOT_ROWS: tl.constexpr, BLOCKS: tl.constexpr, WEIGHT: tl.constexpr):
    """What a lane has of the sums of A's rows g and g + 8: all of its segment in lanes where j is B's column."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    UNIT: tl.constexpr = 1.0 if tl.bfloat16 == WEIGHT else 16.0
    warp, g, j = lane_place()
    zero = tl.zeros([WARPS, LANES], tl.float32)
    c = (zero, zero, zero, zero)
    d = (zero, zero, zero, zero)
    for block in tl.static_range(BLOCKS):
        for i in tl.static_range(2):  # words 2 i and 2 i + 1 of the four that a lane has of a row
            upper = words[8 * block + 2 * i : 8 * block + 2 * i + 2]
            lower = words[8 * block + 2 * i + 4 : 8 * block + 2 * i + 6]
            a = (upper[0], lower[0], upper[1], lower[1])
            x = rounded[4 * block + 2 * i : 4 * block + 2 * i + 2]
            x_rest = rest[4 * block + 2 * i : 4 * block + 2 * i + 2]
            if SEGMENTS == 16:
                c = multiply_add(multiply_add(c, a, x, WEIGHT), a, x_rest, WEIGHT)
                x = rounded[4 * (BLOCKS + block) + 2 * i : 4 * (BLOCKS + block) + 2 * i + 2]
                x_rest = rest[4 * (BLOCKS + block) + 2 * i : 4 * (BLOCKS + block) + 2 * i + 2]
                d = multiply_add(multiply_add(d, a, x, WEIGHT), a, x_rest, WEIGHT)
            elif SEGMENTS == 8:
                c = multiply_add(c, a, x, WEIGHT)
                d = multiply_add(d, a, x_rest, WEIGHT)
            elif i == 0:
                c = multiply_add(c, a, x, WEIGHT)
            else:
                d = multiply_add(d, a, x, WEIGHT)
    if SEGMENTS == 16:  # A's rows g + 8 are segments g + 8, which only d has
        upper = tl.where(g % 2 == 0, c[0], c[1])
        lower = tl.where(g % 2 == 0, d[2], d[3])
    elif SEGMENTS == 8:
        upper = tl.where(g % 2 == 0, c[0] + d[0], c[1] + d[1])
        lower = tl.where(g % 2 == 0, c[2] + d[2], c[3] + d[3])
    else:
        upper = (c[0] + d[0]) + (c[1] + d[1])
        lower = (c[2] + d[2]) + (c[3] + d[3])
    return upper * UNIT, lower * UNIT


@triton.jit
def write_row_sums(sums, upper, lower, SLOT_ROWS: tl.constexpr):
    """Adds up the segments of each row and writes the sums of a slot's rows. `sums`: address of the warp's first one.

    Neighbours in segment differ in g and, so that j stays B's column, in j: lanes 4 g + j and that XOR a mask.
    """
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    warp, g, j = lane_place()
    if SEGMENTS == 1:
        write_float_where(sums + g * 4, upper, (j == g % 2) & (g < SLOT_ROWS))
        write_float_where(sums + (g + 8) * 4, lower, (j == g % 2) & (g + 8 < SLOT_ROWS))
    else:
        if SEGMENTS == 16:
            total = upper + lower
            total += shuffle(total, 4)
        else:  # even segments go on with A's row g, odd ones with row g + 8
            total = tl.where(g % 2 == 0, upper, lower)
            total += shuffle(tl.where(g % 2 == 0, lower, upper), 4 if SEGMENTS == 8 else 5)
        if SEGMENTS >= 8:
            total += shuffle(total, 9)
            total += shuffle(total, 18)
            write_float_where(sums + g * 4, total, (g < SLOT_ROWS) & (j == 0))
        else:
            if SEGMENTS == 4:
                total += shuffle(total, 10)
            row = g // SEGMENTS + g % 2 * (8 // SEGMENTS)
            write_float_where(sums + row * 4, total, (j == g % SEGMENTS) & (j < 2) & (row < SLOT_ROWS))


@triton.jit
def read_slot(ring, variant, row, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """A lane's words of the slot to read, once it is full: four of A's row g and four of row g + 8 per block."""
    SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
    BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
    await_slot(ring[0], ring[2], ring[3])
    address = ring[0] + RING_OFFSET + ring[2] * RING
    words = ()
    for block in tl.static_range(BLOCKS):
        col, has_columns = segment_columns(variant, block, K, SLOT_ROWS)
        wanted = has_columns & (row < SLOT_ROWS)
        words = words + read_words(address + (row * K + col) * 2, wanted.to(tl.int32))
        if SEGMENTS == 16:
            col, has_columns = segment_columns(variant + 8, block, K, SLOT_ROWS)
        lower = row + 8 // SEGMENTS
        wanted = has_columns & (lower < SLOT_ROWS)
        words = words + read_words(address + (lower * K + col) * 2, wanted.to(tl.int32))
    return words


@triton.jit
def stream_rows(ring, x, place, num_rows, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Multiplies the next `num_rows` rows of the weight stream; their sums go to rows `place` and on."""
    if RING:
        SEGMENTS: tl.constexpr = segments_of(SLOT_ROWS)
        BLOCKS: tl.constexpr = (K + 512 * SEGMENTS - 1) // (512 * SEGMENTS)
        warp, g, j = lane_place()
        rounded, rest = split_segment(x, SLOT_ROWS, WEIGHT)
        variant = g % 2 if SEGMENTS == 1 else g % SEGMENTS
        row = g // SEGMENTS  # in the slot, of A's row g; that of A's row g + 8 is half a slot on, if it is another one
        sums = ring[0] + SUMS_OFFSET + warp * (SUMS_ROWS * 4) + place * 4
        num_slots = (num_rows + SLOT_ROWS - 1) // SLOT_ROWS
        zero = tl.zeros([WARPS, LANES], tl.int32)
        words = ()
        for _ in tl.static_range(8 * BLOCKS):
            words = words + (zero,)
        if num_slots > 0:
            words = read_slot(ring, variant, row, K, SLOT_ROWS, RING)
            ring = release_slot(ring, RING)
        for slot in tl.range(0, num_slots, num_stages=1):
            now = words
            if slot + 1 < num_slots:
                words = read_slot(ring, variant, row, K, SLOT_ROWS, RING)
                ring = release_slot(ring, RING)
            upper, lower = multiply_slot(now, rounded, rest, SLOT_ROWS, BLOCKS, WEIGHT)
            write_row_sums(sums + slot * (SLOT_ROWS * 4), upper, lower, SLOT_ROWS)
    return ring


@triton.jit
def end_rows(RING: tl.constexpr):
    """Between `stream_rows` and `row_sums`, and between `row_sums` and the next `stream_rows`."""
    if RING:
        tl.debug_barrier()


@triton.jit
def row_sums(
    ring, place, x_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, NORM: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products [BLOCK_N] of row block `block` with x (times gain); any number beyond `num_rows`."""
    if RING:
        address = ring[0] + SUMS_OFFSET + (place + tl.arange(0, BLOCK_N)) * 4
        total = tl.zeros([BLOCK_N], tl.float32)
        for warp in tl.static_range(WARPS):
            total += read_float(address + warp * (SUMS_ROWS * 4))
        return total
    else:
        first = tl.cast(block, tl.int64) * BLOCK_N
        weight_ptr = (weight_addr + first * (K * WEIGHT.primitive_bitwidth // 8)).to(tl.pointer_type(WEIGHT))
        rows = tl.arange(0, BLOCK_N)[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for col in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = col + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            if NORM:
                x *= tl.load(gain_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + rows * K + cols, mask=(rows < num_rows - first) & (cols < K), other=0.0)
            acc += w.to(tl.float32) * x
        return tl.sum(acc, axis=1)


@triton.jit
def dot_rows(
    ring, x, x_ptr, gain_ptr, weight_addr, block, num_rows,
    K: tl.constexpr, NORM: tl.constexpr, SLOT_ROWS: tl.constexpr,
    RING: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Dot products [BLOCK_N] of row block `block`, for ops with one matrix."""
    end_rows(RING)
    ring = stream_rows(ring, x, 0, tl.minimum(num_rows - block * BLOCK_N, BLOCK_N), K, SLOT_ROWS, RING, WEIGHT)
    end_rows(RING)
    return ring, row_sums(
        ring, 0, x_ptr, gain_ptr, weight_addr, block, num_rows, K, NORM, SLOT_ROWS, RING, WEIGHT, BLOCK_N, BLOCK_K
    )


@triton.jit
def inverse_rms(
    ring, x_ptr, K: tl.constexpr, EPS: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr, BLOCK_K: tl.constexpr
):
    """rsqrt(mean(x^2) + eps). With a ring: after `scale_segment` and a barrier."""
    if RING:
        total = read_float(ring[0] + SQUARES_OFFSET)
        for warp in tl.static_range(1, WARPS):
            total += read_float(ring[0] + SQUARES_OFFSET + warp * 4)
    else:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            squares += x * x
        total = tl.sum(squares, axis=0)
    return tl.rsqrt(total / K + EPS)


def slot_rows(k: int, machine: Machine, task_rows: int, matrices: int = 1) -> int:
    """Rows of K weights that are read at a time: at most 16, and within a slot unless it is one row. `task_rows`: the
    most rows, of each of `matrices`, that a task has.

    As many as fit, if the tensor cores have at most a third more to do than for these. A power of two where a task has
    several blocks of rows, each of which is whole slots.
    """
    if not machine.ring:
        return 0
    rows = max(1, min(16, machine.slot_bytes // (2 * k)))
    one_block = -(-task_rows // rows) * rows <= SUMS_ROWS.value // matrices
    if not one_block or 4 * rows < 3 * next_power_of_2(rows):
        rows = next_power_of_2(rows + 1) // 2
    return rows


def block_rows(machine: Machine, matrices: int = 1) -> int:
    """BLOCK_N: rows whose dot products are finished at a time, of each of `matrices`."""
    return (SUMS_ROWS.value if machine.ring else machine.block_n * matrices) // matrices

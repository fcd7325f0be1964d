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

The 16 warps share out a slot of R rows: each takes the same segment of columns of one or two rows in every slot, so
that a thread holds its part of the activations in registers for the whole task, 8 columns per lane in every 256.

    R = 4    warps 0-7: rows 0 and 1, an eighth of the columns each    warps 8-15: rows 2 and 3

Warps leave their sums in shared memory; after one barrier they are added up, row by row, in the order of the columns.

RING is the size of a slot in bytes. Without a ring (the interpreter, GPUs without bulk copies, weights that are not 16
bits wide or not aligned to 16 bytes) the same functions load [BLOCK_N, BLOCK_K] tiles directly: right on any machine,
and the definition of what the ring does.
"""

import triton
import triton.language as tl

from tri_mpk.ops.op import Machine
from tri_mpk.ops.warps import (
    LANES,
    WARPS,
    high_half,
    load_eight,
    low_half,
    read_float,
    read_words,
    thread_index,
    write_float,
    write_lane_sums,
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
PREFETCHER = tl.constexpr(480)  # the thread that prefetches, lane 0 of the last warp: the first one polls
# Shared memory of ours, in bytes: task descriptors (scheduler/device.py), two barriers of 8 per slot (full, and 128 on,
# empty), sums of squares, the pieces that are prefetched (two barriers and how many pieces there have been), row sums
# (or what attention keeps there), the slots, where prefetched bytes go. The worker's streams lie in front of all that,
# the first one last.
BARRIERS_OFFSET = tl.constexpr(512)
SQUARES_OFFSET = tl.constexpr(768)
PIECES_OFFSET = tl.constexpr(832)
SUMS_OFFSET = tl.constexpr(1024)
SUMS_BYTES = tl.constexpr(8192)
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
    before = slot - 1
    phase_before = phase
    if before < 0:
        before += slots
        phase_before = phase ^ 1
    cursor = request_rows(smem, before, phase_before, cursor, RING)
    slot += 1
    if slot == slots:
        slot = slots * 0
        phase ^= 1
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
            .reg .pred p; .reg .u32 piece, at, parity;
            setp.ne.u32 p, $2, 480; @p bra DONE;
            ld.shared.b32 piece, [$1 + 16];
            and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 parity, piece, 1, 1; xor.b32 parity, parity, 1;
            POLL: mbarrier.try_wait.parity.shared::cta.b64 p, [at], parity; @!p bra POLL;
            xor.b32 at, piece, 1; and.b32 at, at, 1; shl.b32 at, at, 3; add.u32 at, at, $1;
            add.u32 piece, piece, 1; bfe.u32 parity, piece, 1, 1; xor.b32 parity, parity, 1;
            POLL2: mbarrier.try_wait.parity.shared::cta.b64 p, [at], parity; @!p bra POLL2;
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

    One thread copies pieces of 32 KiB to where nobody reads them, two at a time: with more on their way, what others
    load meanwhile waits behind them. Instructions that only prefetch are hints; an H200 drops most of so many.
    """
    if RING and PREFETCH > 0:
        count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
        counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
        smem, slots, slot, phase, cursor = ring
        is_prefetcher = thread_index() == PREFETCHER  # the other threads have nothing to wait for
        wanted = tl.where(is_prefetcher & (count > 0), PREFETCH, 0)
        for _ in tl.range(0, MAX_MATRICES, num_stages=1):
            if wanted > 0:
                num_bytes = tl.minimum(cursor[2], wanted)
                fired = copy_pieces(
                    smem, smem + RING_OFFSET + slots * RING, cursor[1], num_bytes, counter_ptr, epoch * count
                )
                wanted = tl.where(fired != 0, 0, wanted - num_bytes)
                cursor = advance(smem, cursor, num_bytes)


@triton.jit
def copy_pieces(smem, scratch, addr, num_bytes, counter_ptr, count):
    """1 as soon as the counter has come to `count`, 0 when all bytes are requested before."""
    return tl.inline_asm_elementwise(
        # Piece i has barrier i % 2. A piece is requested as 4 KiB and 4 KiB, for the scratch area is not larger.
        """{
        .reg .pred p; .reg .s32 left, piece, size, part, seen; .reg .u32 at; .reg .u64 from, step;
        ld.shared.b32 piece, [$1 + 16]; mov.s32 left, $4; mov.u64 from, $3;
        NEXT:
        setp.le.s32 p, left, 0; @p bra ALL;
        ld.relaxed.gpu.global.s32 seen, [$5]; sub.s32 seen, seen, $6; setp.ge.s32 p, seen, 0; @p bra FIRED;
        and.b32 at, piece, 1; shl.b32 at, at, 3; add.u32 at, at, $1; bfe.u32 seen, piece, 1, 1; xor.b32 seen, seen, 1;
        mbarrier.test_wait.parity.shared::cta.b64 p, [at], seen; @!p bra NEXT;
        min.s32 size, left, 32768; sub.s32 left, left, size; add.s32 piece, piece, 1;
        mbarrier.arrive.expect_tx.shared::cta.b64 _, [at], size;
        PART:
        min.s32 part, size, 4096;
        cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [from], part, [at];
        cvt.u64.u32 step, part; add.u64 from, from, step; sub.s32 size, size, part; setp.gt.s32 p, size, 0; @p bra PART;
        bra NEXT;
        FIRED: mov.u32 $0, 1; bra DONE;
        ALL: mov.u32 $0, 0;
        DONE: st.shared.b32 [$1 + 16], piece;
        }""",
        "=&r,r,r,l,r,l,r",
        [smem + PIECES_OFFSET, scratch, addr, num_bytes, counter_ptr.to(tl.int64), count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


# ---- one task ----


@triton.jit
def thread_place(K: tl.constexpr, SLOT_ROWS: tl.constexpr):
    """[WARPS, LANES], one element per thread: first row in a slot, segment, first column in the segment."""
    SEGMENTS: tl.constexpr = 16 if SLOT_ROWS == 1 else 32 // SLOT_ROWS
    WARP_ROWS: tl.constexpr = SLOT_ROWS * SEGMENTS // 16
    warp = tl.arange(0, WARPS)[:, None] + tl.zeros([1, LANES], tl.int32)
    lane = tl.zeros([WARPS, 1], tl.int32) + tl.arange(0, LANES)[None, :]
    return warp // SEGMENTS * WARP_ROWS, warp % SEGMENTS, lane * 8


@triton.jit
def load_segment(ptr, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr):
    """A thread's part of a vector [K] in fp32 registers. A gain is loaded so before the wait, activations after it."""
    if RING:
        SEGMENTS: tl.constexpr = 16 if SLOT_ROWS == 1 else 32 // SLOT_ROWS
        COLS: tl.constexpr = (K + 8 * SEGMENTS - 1) // (8 * SEGMENTS) * 8
        row, segment, first = thread_place(K, SLOT_ROWS)
        values = ()
        for start in tl.static_range(0, COLS, 256):
            col = segment * COLS + start + first
            values = values + load_eight(ptr + col, ((start + first < COLS) & (col < K)).to(tl.int32))
        return values
    else:
        return ()


@triton.jit
def scale_segment(ring, x, gain, RING: tl.constexpr):
    """x * gain, part by part; leaves the sums of x^2 of all segments in shared memory."""
    if RING:
        scaled = ()
        squares = tl.zeros([WARPS, LANES], tl.float32)
        for i in tl.static_range(len(x)):
            squares += x[i] * x[i]
            scaled = scaled + (x[i] * gain[i],)
        write_float(ring[0] + SQUARES_OFFSET + tl.arange(0, WARPS) * 4, tl.sum(squares, axis=1))
        return scaled
    else:
        return ()


@triton.jit
def stream_rows(ring, x, place, num_rows, K: tl.constexpr, SLOT_ROWS: tl.constexpr, RING: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Multiplies the next `num_rows` rows of the weight stream; their sums go to rows `place` and on."""
    if RING:
        SEGMENTS: tl.constexpr = 16 if SLOT_ROWS == 1 else 32 // SLOT_ROWS
        WARP_ROWS: tl.constexpr = SLOT_ROWS * SEGMENTS // 16
        COLS: tl.constexpr = (K + 8 * SEGMENTS - 1) // (8 * SEGMENTS) * 8
        WORDS: tl.constexpr = (COLS + 255) // 256 * 4
        row, segment, first = thread_place(K, SLOT_ROWS)
        offset = (row * K + segment * COLS + first) * 2
        sums = ring[0] + SUMS_OFFSET + ((place + row) * SEGMENTS + segment) * 4
        for slot in tl.range(0, (num_rows + SLOT_ROWS - 1) // SLOT_ROWS, num_stages=1):
            await_slot(ring[0], ring[2], ring[3])
            address = ring[0] + RING_OFFSET + ring[2] * RING + offset
            words = ()
            for r in tl.static_range(WARP_ROWS):
                for start in tl.static_range(0, COLS, 256):
                    wanted = ((start + first < COLS) & (segment * COLS + start + first < K)).to(tl.int32)
                    words = words + read_words(address + (r * K + start) * 2, wanted)
            ring = release_slot(ring, RING)
            totals = ()
            for r in tl.static_range(WARP_ROWS):
                even = tl.zeros([WARPS, LANES], tl.float32)
                odd = tl.zeros([WARPS, LANES], tl.float32)
                for i in tl.static_range(WORDS):
                    even += low_half(words[r * WORDS + i], WEIGHT) * x[2 * i]
                    odd += high_half(words[r * WORDS + i], WEIGHT) * x[2 * i + 1]
                totals = totals + (even + odd,)
            at = sums + slot * (SLOT_ROWS * SEGMENTS * 4)
            last: tl.constexpr = WARP_ROWS - 1  # a single row is summed up and written twice
            write_lane_sums(at, at + last * (SEGMENTS * 4), totals[0], totals[last])
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
        SEGMENTS: tl.constexpr = 16 if SLOT_ROWS == 1 else 32 // SLOT_ROWS
        address = ring[0] + SUMS_OFFSET + (place + tl.arange(0, BLOCK_N)) * (SEGMENTS * 4)
        total = tl.zeros([BLOCK_N], tl.float32)
        for segment in tl.static_range(SEGMENTS):
            total += read_float(address + segment * 4)
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
    ring = stream_rows(
        ring, x, 0, tl.minimum(num_rows - block * BLOCK_N, BLOCK_N), K, SLOT_ROWS, RING, WEIGHT
    )
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
        SEGMENTS: tl.constexpr = 16 if SLOT_ROWS == 1 else 32 // SLOT_ROWS
        total = read_float(ring[0] + SQUARES_OFFSET)
        for segment in tl.static_range(1, SEGMENTS):
            total += read_float(ring[0] + SQUARES_OFFSET + segment * 4)
    else:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=1):
            cols = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
            squares += x * x
        total = tl.sum(squares, axis=0)
    return tl.rsqrt(total / K + EPS)


def slot_rows(k: int, machine: Machine) -> int:
    """Rows of K weights that are read at a time: a power of two, at most 16, and within a slot unless it is one row."""
    if not machine.ring:
        return 0
    rows = 16
    while rows > 1 and rows * k * 2 > machine.slot_bytes:
        rows //= 2
    return rows


def block_rows(k: int, machine: Machine, matrices: int = 1) -> int:
    """BLOCK_N: rows whose dot products are finished at a time, of each of `matrices`."""
    rows = slot_rows(k, machine)
    if not rows:
        return machine.block_n
    segments = 16 if rows == 1 else 32 // rows
    return min(512, SUMS_BYTES.value // (4 * segments)) // matrices

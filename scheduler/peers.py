"""Other ranks, from inside the kernel: waits for signals of theirs, and signals and data sent to them.

Each rank has a heap at an address that all ranks know: first its counters, then its symmetric tensors, at the same
places on all ranks. So what lies at an address of this rank's heap lies `delta` bytes further in another's. The deltas
are in the descriptors of all tasks that signal to all ranks, one per rank, 0 for the own one.

A signal is as in device.py, with a release at system scope, once per rank: what all threads of this worker stored
before, on whatever rank, may be read by those who then see the signal with an acquire at system scope.
"""

import triton
import triton.language as tl

from .device import (
    CONTROL_ABORT,
    CONTROL_STUCK_SEEN,
    CONTROL_STUCK_TASK,
    CONTROL_STUCK_WANTED,
    CONTROL_WAIT_BOUND,
    TASK_SIGNALS,
    TASK_VARIANT,
    TASK_WAIT,
    TASK_WAIT_COUNT,
    int_field,
    task_word,
)

TASK_PEERS = tl.constexpr(20)  # up to MAX_RANKS words behind the op's own fields: the deltas
MAX_RANKS = 8
PEER_TASK_WORDS = 32  # a whole number of lines, with room for what a profiled kernel keeps in its last words


@triton.jit
def wait_counter_of_ranks(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr):
    """`wait_counter`, for signals that come from other ranks too."""
    if PORTABLE:
        bound = tl.load(control_ptr + CONTROL_WAIT_BOUND)
        polls = bound * 0
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
        while (seen - wanted < 0) & (polls < bound):
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="sys")
            aborted = tl.load(control_ptr + CONTROL_ABORT, volatile=True) != 0
            polls = tl.where(aborted, bound, polls + 1)
        if seen - wanted < 0:  # noqa: SIM102  Triton evaluates both sides of `and`
            if tl.atomic_cas(control_ptr + CONTROL_ABORT, bound * 0, bound * 0 + 1, sem="relaxed", scope="gpu") == 0:
                tl.store(control_ptr + CONTROL_STUCK_TASK, task_idx)
                tl.store(control_ptr + CONTROL_STUCK_SEEN, seen)
                tl.store(control_ptr + CONTROL_STUCK_WANTED, wanted)
        tl.debug_barrier()
    else:
        # Byte offsets and units of time are those of `wait_counter`.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .s32 seen, left, polls; .reg .u32 tid, flag, start, time, limit; .reg .u64 wide;
            mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0; @p bra DONE;
            ld.acquire.sys.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            mov.u64 wide, %globaltimer; shr.u64 wide, wide, 10; cvt.u32.u64 start, wide;
            MORE: mov.s32 polls, 0;
            POLL: ld.acquire.sys.global.s32 seen, [$1]; sub.s32 left, seen, $2; setp.ge.s32 p, left, 0; @p bra DONE;
            add.s32 polls, polls, 1; setp.lt.s32 p, polls, 1000; @p bra POLL;
            ld.relaxed.gpu.global.u32 flag, [$3 + 72]; setp.ne.u32 p, flag, 0; @p bra DONE;
            mov.u64 wide, %globaltimer; shr.u64 wide, wide, 10; cvt.u32.u64 time, wide; sub.u32 time, time, start;
            ld.global.u64 wide, [$3 + 40]; shr.u64 wide, wide, 10; min.u64 wide, wide, 0xfffffffe;
            cvt.u32.u64 limit, wide; setp.lt.u32 p, time, limit; @p bra MORE;
            atom.relaxed.gpu.global.cas.b32 flag, [$3 + 72], 0, 1; setp.ne.u32 p, flag, 0; @p bra DONE;
            cvt.s64.s32 wide, $4; st.global.s64 [$3 + 80], wide;
            cvt.s64.s32 wide, seen; st.global.s64 [$3 + 88], wide;
            cvt.s64.s32 wide, $2; st.global.s64 [$3 + 96], wide;
            DONE: bar.sync 0; mov.u32 $0, 0;
            }""",
            "=r,l,r,l,r",
            [counter_ptr.to(tl.int64), wanted, control_ptr.to(tl.int64), task_idx],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """What this task's producers wrote, on whatever rank they run, may be read afterwards."""
    count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
    if count > 0:
        task_idx = (task_word(task, TASK_VARIANT, PORTABLE) >> 32).to(tl.int32)
        counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
        wait_counter_of_ranks(counter_ptr, epoch * count, task_idx, control_ptr, PORTABLE)


@triton.jit
def push(task, ptr, values, mask, SIZE: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """Stores to the place `ptr` of every rank's heap. SIZE: bytes of an element."""
    for rank in tl.static_range(RANKS):
        delta = task_word(task, TASK_PEERS + rank, PORTABLE) // SIZE
        tl.store(ptr + delta, values, mask=mask)


@triton.jit
def signal_ranks(task, event_ptr, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """`signal`, to the events of all ranks."""
    first = task_word(task, TASK_SIGNALS, PORTABLE)
    second = task_word(task, TASK_SIGNALS + 1, PORTABLE)
    if PORTABLE:
        tl.debug_barrier()
        for i in tl.static_range(4):
            pair = first if i < 2 else second
            counter = (pair >> (32 * (i % 2))).to(tl.int32)
            if counter >= 0:
                for rank in tl.static_range(RANKS):
                    delta = task_word(task, TASK_PEERS + rank, PORTABLE) // 4
                    tl.atomic_add(event_ptr + (delta + counter), 1, sem="release", scope="sys")
    else:
        # Lane 4 * r + i of the last warp signals the i-th event of rank r. It reads the descriptor before the barrier:
        # behind it the first warp may copy another one to where this one lies.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p, q; .reg .u32 tid, bit, rank; .reg .s32 a, b, c, d; .reg .u64 address, delta;
            mov.b64 {a, b}, $2; mov.b64 {c, d}, $3;
            mov.u32 tid, %tid.x; mov.u32 bit, %ntid.x; sub.u32 tid, tid, bit; add.u32 tid, tid, 32;
            shr.u32 rank, tid, 2; setp.lt.u32 q, rank, $5;
            and.b32 bit, tid, 1; setp.ne.u32 p, bit, 0; selp.s32 a, b, a, p; selp.s32 c, d, c, p;
            and.b32 bit, tid, 2; setp.ne.u32 p, bit, 0; selp.s32 a, c, a, p;
            setp.ge.and.s32 q, a, 0, q;
            mov.u64 delta, 0; mad.lo.u32 bit, rank, 8, $4; @q ld.shared.b64 delta, [bit];
            mad.wide.s32 address, a, 4, $1; add.u64 address, address, delta;
            cp.async.wait_all;
            bar.sync 0;
            @q red.release.sys.global.add.u32 [address], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l,l,l,r,r",
            [event_ptr.to(tl.int64), first, second, task + TASK_PEERS * 8, task * 0 + RANKS],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

"""Other ranks, from inside the kernel: waits for signals of theirs, and signals and data sent to them.

Each rank has a heap at an address that all ranks know: first its counters, then its symmetric tensors, at the same
places on all ranks. So what lies at an address of this rank's heap lies `delta` bytes further in another's. The deltas
are in the descriptors of all tasks that signal to all ranks, one per rank, 0 for the own one. A task that reaches one
rank only (`Task.ahead`) has that rank's delta alone: for `push` and `signal_ranks` there is RANKS = 1 then.

A signal is as in device.py, with a release at system scope, once per rank: what all threads of this worker stored
before, on whatever rank, may be read by those who then see the signal with an acquire at system scope.
"""

import triton
import triton.language as tl

from .device import (
    TASK_SIGNALS,
    TASK_VARIANT,
    TASK_WAIT,
    TASK_WAIT_COUNT,
    int_field,
    poll_counter,
    task_word,
    wait,
)

TASK_PEERS = tl.constexpr(20)  # up to MAX_RANKS words behind the op's own fields: the deltas
MAX_RANKS = 8
PEER_TASK_WORDS = 32  # a whole number of lines, with room for what a profiled kernel keeps in its last words


@triton.jit
def wait_counter_of_ranks(counter_ptr, wanted, task_idx, control_ptr, PORTABLE: tl.constexpr):
    """`wait_counter`, for signals that come from other ranks too."""
    poll_counter(counter_ptr, wanted, task_idx, control_ptr, PORTABLE, "sys")


@triton.jit
def wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """What this task's producers wrote, on whatever rank they run, may be read afterwards."""
    count = int_field(task, TASK_WAIT_COUNT, PORTABLE)
    if count > 0:
        task_idx = (task_word(task, TASK_VARIANT, PORTABLE) >> 32).to(tl.int32)
        counter_ptr = event_ptr + task_word(task, TASK_WAIT, PORTABLE)
        wait_counter_of_ranks(counter_ptr, epoch * count, task_idx, control_ptr, PORTABLE)


@triton.jit
def wait_for_any(task, event_ptr, control_ptr, epoch, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """`wait_for_ranks`, or `wait` in a kernel of one rank."""
    if RANKS > 1:
        wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    else:
        wait(task, event_ptr, control_ptr, epoch, PORTABLE)


@triton.jit
def at_peer(task, ptr, index, SIZE: tl.constexpr, PORTABLE: tl.constexpr):
    """The place `ptr` of the heap of the rank that this task reaches as its `index`-th. SIZE: bytes of an element."""
    return ptr + task_word(task, TASK_PEERS + index, PORTABLE) // SIZE


@triton.jit
def push(task, ptr, values, mask, SIZE: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """Stores to the place `ptr` of every rank's heap."""
    for rank in tl.static_range(RANKS):
        tl.store(at_peer(task, ptr, rank, SIZE, PORTABLE), values, mask=mask)


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

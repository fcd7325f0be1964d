"""Pools inside the kernel: who completes an event releases its tasks, and free workers take them.

A pool has a counter of tickets taken, a counter of tasks released, and as many slots as tasks. All only grow: in a step
in which the pool's tasks are numbered from `stamp` = epoch * size on, slot i comes to hold the number of the i-th task
that is released. So a worker with ticket i waits for its slot as for any event, until `slot - stamp >= 0`, and then
finds there which task it runs. Each worker draws one ticket too many, by which it knows that none is left.

The signal that completes an event is the one after which its counter stands at RELEASE_TARGET. Its worker has then
seen what all producers wrote, and whoever reads a slot sees that too: tasks of pools wait for nothing more.
"""

import triton
import triton.language as tl

from .device import (
    TASK_SIGNALS,
    int_field,
    task_word,
    wait_counter,
)

SLOT_STRIDE = tl.constexpr(8)  # int32 between two slots: a sector of 32 bytes each, for each has another worker waiting
POOL_VARIANT = tl.constexpr(-2)  # the record in a worker's queue where it comes to a pool

# Fields of that record. Places are indices into event_ptr, where a pool's counters and slots follow the events.
POOL_TICKETS = tl.constexpr(10)  # counter of tickets taken
POOL_DRAWN = tl.constexpr(11)  # tickets that are taken in a step: one per task and one per worker
POOL_SLOTS = tl.constexpr(12)  # first slot
POOL_SIZE = tl.constexpr(13)  # tasks
POOL_RECORD = tl.constexpr(14)  # first task's descriptor, of all in queue_ptr; upper half: how much later its record
# of time stamps comes among those of a step
POOL_NAME = tl.constexpr(15)  # what a wait for a task of the pool is called

# Words (int32) behind the counter of an event that releases tasks. Signals to it have RELEASES set in their index.
RELEASES = tl.constexpr(1)
RELEASE_TARGET = tl.constexpr(1)  # the counter when the event is next complete
RELEASE_STAMP = tl.constexpr(2)  # number of the pool's first task in that step
RELEASE_COUNT = tl.constexpr(3)  # signals per step
RELEASE_SIZE = tl.constexpr(4)  # tasks of the pool
RELEASE_FIRST = tl.constexpr(5)  # first of the tasks that are released, within the pool
RELEASE_NUM = tl.constexpr(6)  # and how many they are
RELEASE_TAIL = tl.constexpr(7)  # counter of tasks released
RELEASE_SLOTS = tl.constexpr(8)  # first slot


@triton.jit
def take_ticket(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """Where the descriptor of the next task of this pool lies, once it is released; -1 when none is left."""
    size = int_field(task, POOL_SIZE, PORTABLE)
    drawn = (epoch - 1) * int_field(task, POOL_DRAWN, PORTABLE)
    tickets_ptr = event_ptr + task_word(task, POOL_TICKETS, PORTABLE)
    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed", scope="gpu") - drawn
    record = ticket * 0 - 1
    if ticket < size:
        slot_ptr = event_ptr + task_word(task, POOL_SLOTS, PORTABLE) + ticket * SLOT_STRIDE
        wait_counter(slot_ptr, epoch * size, int_field(task, POOL_NAME, PORTABLE), control_ptr, PORTABLE)
        number = tl.load(slot_ptr, volatile=True) - epoch * size
        if (number >= 0) & (number < size):  # else the launch ends
            record = int_field(task, POOL_RECORD, PORTABLE) + number
    return record


@triton.jit
def signal_and_release(task, event_ptr, PORTABLE: tl.constexpr):
    """`signal`, and the tasks of pools that waited for it are released."""
    first = task_word(task, TASK_SIGNALS, PORTABLE)
    second = task_word(task, TASK_SIGNALS + 1, PORTABLE)
    if PORTABLE:
        tl.debug_barrier()
        for i in tl.static_range(4):
            pair = first if i < 2 else second
            counter = (pair >> (32 * (i % 2))).to(tl.int32)
            if counter >= 0:
                line_ptr = event_ptr + (counter - counter % 2)
                seen = tl.atomic_add(line_ptr, 1, sem="acq_rel", scope="gpu") + 1
                if counter % 2 == RELEASES:
                    target = tl.load(line_ptr + RELEASE_TARGET, volatile=True)
                    if seen == target:
                        stamp = tl.load(line_ptr + RELEASE_STAMP)
                        size = tl.load(line_ptr + RELEASE_SIZE)
                        num = tl.load(line_ptr + RELEASE_NUM)
                        tl.store(line_ptr + RELEASE_TARGET, target + tl.load(line_ptr + RELEASE_COUNT))
                        tl.store(line_ptr + RELEASE_STAMP, stamp + size)
                        tail_ptr = event_ptr + tl.load(line_ptr + RELEASE_TAIL)
                        slot = tl.atomic_add(tail_ptr, num, sem="relaxed", scope="gpu") - (stamp - size)
                        slot_ptr = event_ptr + tl.load(line_ptr + RELEASE_SLOTS) + slot * SLOT_STRIDE
                        number = stamp + tl.load(line_ptr + RELEASE_FIRST)
                        for k in range(num):
                            tl.atomic_xchg(slot_ptr + k * SLOT_STRIDE, number + k, sem="release", scope="gpu")
    else:
        # As in `signal`. The lane that completes an event has acquired what its producers wrote; the fence passes that
        # on with what it writes to the slots. Byte offsets are 4 x the RELEASE_ words above, and 32 is 4 x SLOT_STRIDE.
        tl.inline_asm_elementwise(
            """{
            .reg .pred p, q; .reg .u32 tid, odd, first; .reg .s32 a, b, c, d;
            .reg .u64 address, at; .reg .s32 seen, target, stamp, count, size, number, num, place;
            cp.async.wait_all;
            bar.sync 0;
            mov.b64 {a, b}, $2; mov.b64 {c, d}, $3;
            mov.u32 tid, %tid.x; mov.u32 first, %ntid.x; sub.u32 first, first, 32; sub.u32 tid, tid, first;
            and.b32 odd, tid, 1; setp.ne.u32 p, odd, 0;
            selp.s32 a, b, a, p; selp.s32 c, d, c, p;
            setp.ge.u32 p, tid, 2; selp.s32 a, c, a, p;
            setp.lt.u32 p, tid, 4; setp.ge.and.s32 q, a, 0, p; @!q bra DONE;
            and.b32 odd, a, 1; and.b32 a, a, -2; mad.wide.s32 address, a, 4, $1;
            setp.ne.u32 p, odd, 0; @p bra RELEASE;
            red.release.gpu.global.add.u32 [address], 1; bra DONE;
            RELEASE: atom.acq_rel.gpu.global.add.u32 seen, [address], 1;
            ld.relaxed.gpu.global.s32 target, [address + 4];
            ld.relaxed.gpu.global.s32 stamp, [address + 8];
            ld.relaxed.gpu.global.s32 count, [address + 12];
            ld.relaxed.gpu.global.s32 size, [address + 16];
            ld.relaxed.gpu.global.s32 number, [address + 20];
            ld.relaxed.gpu.global.s32 num, [address + 24];
            ld.relaxed.gpu.global.s32 place, [address + 28];
            ld.relaxed.gpu.global.s32 c, [address + 32];
            add.s32 seen, seen, 1; setp.ne.s32 p, seen, target; @p bra DONE;
            add.s32 target, target, count; st.relaxed.gpu.global.s32 [address + 4], target;
            add.s32 number, number, stamp;
            mad.wide.s32 at, place, 4, $1; atom.relaxed.gpu.global.add.u32 place, [at], num;
            sub.s32 place, place, stamp; add.s32 place, place, size;
            add.s32 stamp, stamp, size; st.relaxed.gpu.global.s32 [address + 8], stamp;
            mad.wide.s32 at, c, 4, $1; mad.wide.s32 at, place, 32, at;
            fence.acq_rel.gpu;
            NEXT: st.relaxed.gpu.global.s32 [at], number; add.s64 at, at, 32; add.s32 number, number, 1;
            sub.s32 num, num, 1; setp.gt.s32 p, num, 0; @p bra NEXT;
            DONE: mov.u32 $0, 0;
            }""",
            "=r,l,l,l",
            [event_ptr.to(tl.int64), first, second],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

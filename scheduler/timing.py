"""Time stamps: what a profiled kernel calls in place of `wait` and `signal`, and what its worker loop adds.

Every task of every step leaves a record: when its wait began and ended, when its work was done, when its signals were
sent. Lane 0 of the last warp, which also signals, takes all stamps of a worker, so that they are in order. It keeps
them in spare words of the task's descriptor and writes the record after the signals: a store that is under way would
delay them.

Records lie behind the control block, those of step s (a position) in place s % CONTROL_RECORDED_STEPS. Within a step,
each worker has a record of when the step began for it, one per entry of its queue, in order, and one of its wait for
the step event. Behind those of all workers are the records of tasks of pools. Such a task waits for nothing once it is
taken; where others have when their wait began, it has its worker.

On a GPU the clock is %globaltimer, in nanoseconds, which all SMs share (on an H200 it moves in steps of 32). The
interpreter cannot read a clock; there the time is how often all workers together have asked for it, which says what
came before what and not how long it took.
"""

import triton
import triton.language as tl

from .device import (
    CONTROL_CLOCK,
    CONTROL_RECORDED_STEPS,
    CONTROL_RECORDS,
    CONTROL_STEP_RECORDS,
    signal,
    wait,
)

RECORD_WORDS = tl.constexpr(4)
WORKER_RECORDS = tl.constexpr(2)  # per step, besides those of its tasks

# Spare words of a task descriptor, behind the op's own fields: the descriptors of a profiled kernel have 32 words.
TIMED_TASK_WORDS = 32
TASK_STAMPS = tl.constexpr(28)  # two words: when the wait began and ended
TASK_RECORD = tl.constexpr(30)  # address of the task's record in this step
TASK_CLOCK = tl.constexpr(31)  # address of the interpreter's clock


@triton.jit
def read_clock(clock_ptr, PORTABLE: tl.constexpr):
    """The time when all threads have come here, in the thread that takes stamps; 0 in the others.

    A warp goes on for some instructions behind a barrier before it stops there, and reads a clock that follows. The
    barrier before this one is over by then.
    """
    if PORTABLE:
        return tl.atomic_add(clock_ptr, 1, sem="relaxed", scope="gpu")
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 tid, last;
            mov.u32 tid, %tid.x; mov.u32 last, %ntid.x; sub.u32 last, last, 32; setp.eq.u32 p, tid, last;
            bar.sync 0; mov.u64 $0, 0; @p mov.u64 $0, %globaltimer;
            }""",
            "=l",
            [],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def set_task_word(task, word, value, PORTABLE: tl.constexpr):
    """For `own_word` in the thread that takes stamps; the descriptor is this worker's own copy."""
    if PORTABLE:
        tl.store(task + word, value)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 tid, last;
            mov.u32 tid, %tid.x; mov.u32 last, %ntid.x; sub.u32 last, last, 32; setp.eq.u32 p, tid, last;
            @p st.shared.b64 [$1], $2; mov.u32 $0, 0;
            }""",
            "=r,r,l",
            [task + word * 8, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def own_word(task, word, PORTABLE: tl.constexpr):
    """What `set_task_word` wrote. `task_word` is for words that nobody writes: the compiler may read those later."""
    if PORTABLE:
        return tl.load(task + word)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b64 $0, [$1];", "=l,r", [task + word * 8], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def task_clock(task, PORTABLE: tl.constexpr):
    """Where `read_clock` finds the time within a task; a GPU needs no address."""
    if PORTABLE:
        return own_word(task, TASK_CLOCK, PORTABLE).to(tl.pointer_type(tl.int64))
    else:
        return 0


@triton.jit
def write_record(record_ptr, first, second, third, fourth, PORTABLE: tl.constexpr):
    if PORTABLE:
        tl.store(record_ptr, first)
        tl.store(record_ptr + 1, second)
        tl.store(record_ptr + 2, third)
        tl.store(record_ptr + 3, fourth)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 tid, last;
            mov.u32 tid, %tid.x; mov.u32 last, %ntid.x; sub.u32 last, last, 32; setp.eq.u32 p, tid, last;
            @p st.global.v2.b64 [$1], {$2, $3}; @p st.global.v2.b64 [$1 + 16], {$4, $5}; mov.u32 $0, 0;
            }""",
            "=r,l,l,l,l,l",
            [record_ptr.to(tl.int64), first, second, third, fourth],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def record_address(control_ptr, record):
    return control_ptr + CONTROL_RECORDS + record.to(tl.int64) * RECORD_WORDS


@triton.jit
def first_record(first_task, worker):
    """The number of a worker's first record within a step, from that of its first task in the queue."""
    return first_task.to(tl.int32) + worker * WORKER_RECORDS


@triton.jit
def begin_step(control_ptr, worker_record, step, PORTABLE: tl.constexpr):
    """The number of this worker's first record of a step, which says when the step began."""
    place = step % tl.load(control_ptr + CONTROL_RECORDED_STEPS).to(tl.int32)
    record = place * tl.load(control_ptr + CONTROL_STEP_RECORDS).to(tl.int32) + worker_record
    now = read_clock(control_ptr + CONTROL_CLOCK, PORTABLE)
    write_record(record_address(control_ptr, record), now, now, now, now, PORTABLE)
    return record


@triton.jit
def begin_record(task, record, control_ptr, PORTABLE: tl.constexpr):
    """Tells `timed_signal` where the record of this task goes."""
    set_task_word(task, TASK_RECORD, record_address(control_ptr, record).to(tl.int64), PORTABLE)
    if PORTABLE:
        set_task_word(task, TASK_CLOCK, (control_ptr + CONTROL_CLOCK).to(tl.int64), PORTABLE)


@triton.jit
def name_worker(control_ptr, record, worker, PORTABLE: tl.constexpr):
    """Who ran the task of a pool that has left this record."""
    worker = worker.to(tl.int64)
    if PORTABLE:
        tl.store(record_address(control_ptr, record), worker)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p; .reg .u32 tid, last;
            mov.u32 tid, %tid.x; mov.u32 last, %ntid.x; sub.u32 last, last, 32; setp.eq.u32 p, tid, last;
            @p st.global.b64 [$1], $2; mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [record_address(control_ptr, record).to(tl.int64), worker],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def timed_wait(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """`wait`, and when it began and ended. A task that waits for nothing has both stamps too."""
    set_task_word(task, TASK_STAMPS, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    set_task_word(task, TASK_STAMPS + 1, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)


@triton.jit
def timed_signal(task, event_ptr, PORTABLE: tl.constexpr):
    """`signal`, and the task's record: work is done when the last warp of the worker has come here."""
    # read before the barrier: behind it the first warp may copy another descriptor to where this one lies
    waits = own_word(task, TASK_STAMPS, PORTABLE)
    runs = own_word(task, TASK_STAMPS + 1, PORTABLE)
    record_ptr = own_word(task, TASK_RECORD, PORTABLE).to(tl.pointer_type(tl.int64))
    clock_ptr = task_clock(task, PORTABLE)
    tl.debug_barrier()
    signals = read_clock(clock_ptr, PORTABLE)
    signal(task, event_ptr, PORTABLE)
    write_record(record_ptr, waits, runs, signals, read_clock(clock_ptr, PORTABLE), PORTABLE)


@triton.jit
def end_step(control_ptr, record, waits, PORTABLE: tl.constexpr):
    """The record of the wait for the step event, which is over."""
    now = read_clock(control_ptr + CONTROL_CLOCK, PORTABLE)
    write_record(record_address(control_ptr, record), waits, now, now, now, PORTABLE)

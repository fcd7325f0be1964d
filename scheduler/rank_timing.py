"""Time stamps of tasks that wait for other ranks or signal to them: see timing.py and peers.py."""

import triton
import triton.language as tl

from .peers import signal_ranks, wait_for_any, wait_for_ranks
from .timing import TASK_RECORD, TASK_STAMPS, own_word, read_clock, set_task_word, task_clock, write_record


@triton.jit
def timed_wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """`wait_for_ranks`, and when it began and ended."""
    set_task_word(task, TASK_STAMPS, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    set_task_word(task, TASK_STAMPS + 1, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)


@triton.jit
def timed_wait_for_any(task, event_ptr, control_ptr, epoch, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """`wait_for_any`, and when it began and ended."""
    set_task_word(task, TASK_STAMPS, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    set_task_word(task, TASK_STAMPS + 1, read_clock(task_clock(task, PORTABLE), PORTABLE), PORTABLE)


@triton.jit
def timed_signal_ranks(task, event_ptr, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    """`signal_ranks`, and the task's record, as `timed_signal` leaves it."""
    waits = own_word(task, TASK_STAMPS, PORTABLE)
    runs = own_word(task, TASK_STAMPS + 1, PORTABLE)
    record_ptr = own_word(task, TASK_RECORD, PORTABLE).to(tl.pointer_type(tl.int64))
    clock_ptr = task_clock(task, PORTABLE)
    tl.debug_barrier()
    signals = read_clock(clock_ptr, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)
    write_record(record_ptr, waits, runs, signals, read_clock(clock_ptr, PORTABLE), PORTABLE)

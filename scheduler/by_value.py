"""Waits and signals whose counter a value chooses, inside the kernel.

A tile function loads the value (an expert id, the number of tiles that have work) and passes it with the place of a
table, a field of its descriptor that packing fills in (`EventUse`). The table lies behind the counters and says for
which numbers there is a counter, where the event tensor begins, and how far apart its counters are. Constants, written
by the host once: one compiled kernel for all numbers. Tasks without values call none of this.
"""

import triton
import triton.language as tl

from .device import TASK_VARIANT, task_word, wait_counter

# A table is the number of its entries, and then the entries: int32 words of one of these kinds.
USE_WORDS = tl.constexpr(5)  # of a wait or a signal
USE_LO = tl.constexpr(0)  # for lo <= value < hi the counter is first + stride * value
USE_HI = tl.constexpr(1)
USE_FIRST = tl.constexpr(2)
USE_STRIDE = tl.constexpr(3)
USE_COUNT = tl.constexpr(4)  # signals per step, for waits
ABSENT_WORDS = tl.constexpr(4)  # of an announcement
ABSENT_VALUE = tl.constexpr(0)  # which of the announced values
ABSENT_LO = tl.constexpr(1)  # for lo <= value < hi somebody else signals the counter
ABSENT_HI = tl.constexpr(2)
ABSENT_COUNTER = tl.constexpr(3)
ABSENT_BLOCK = tl.constexpr(32)  # announced at once


@triton.jit
def wait_by_value(value, table, task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    """What this task needs in steps with this value may be read afterwards. Load the value after `wait`."""
    table_ptr = event_ptr + table
    task_idx = (task_word(task, TASK_VARIANT, PORTABLE) >> 32).to(tl.int32)
    for i in range(tl.load(table_ptr)):
        use_ptr = table_ptr + 1 + i * USE_WORDS
        if (value >= tl.load(use_ptr + USE_LO)) & (value < tl.load(use_ptr + USE_HI)):
            counter = tl.load(use_ptr + USE_FIRST) + tl.load(use_ptr + USE_STRIDE) * value
            wanted = epoch * tl.load(use_ptr + USE_COUNT)
            wait_counter(event_ptr + counter, wanted, task_idx, control_ptr, PORTABLE)


@triton.jit
def signal_by_value(value, table, event_ptr, PORTABLE: tl.constexpr):
    """All that this worker wrote may be read by whoever waits for it in steps with this value. Then call `signal`."""
    table_ptr = event_ptr + table
    if PORTABLE:
        tl.debug_barrier()
    for i in range(tl.load(table_ptr)):
        use_ptr = table_ptr + 1 + i * USE_WORDS
        if (value >= tl.load(use_ptr + USE_LO)) & (value < tl.load(use_ptr + USE_HI)):
            counter_ptr = event_ptr + (tl.load(use_ptr + USE_FIRST) + tl.load(use_ptr + USE_STRIDE) * value)
            if PORTABLE:
                tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
            else:
                tl.inline_asm_elementwise(
                    """{
                    .reg .pred p; .reg .u32 tid;
                    bar.sync 0; mov.u32 tid, %tid.x; setp.ne.u32 p, tid, 0;
                    @!p red.release.gpu.global.add.u32 [$1], 1;
                    mov.u32 $0, 0;
                    }""",
                    "=r,l",
                    [counter_ptr.to(tl.int64)],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )


@triton.jit
def announce(values_ptr, table, event_ptr):
    """For those who do not signal in steps with these values, so that every counter gets as much in every step.

    `values_ptr` is the tensor of all values that this task announces, which it has written or waited for.
    """
    table_ptr = event_ptr + table
    num = tl.load(table_ptr)
    tl.debug_barrier()
    for first in range(0, num, ABSENT_BLOCK):
        entries = first + tl.arange(0, ABSENT_BLOCK)
        there = entries < num
        entry_ptr = table_ptr + 1 + entries * ABSENT_WORDS
        value = tl.load(values_ptr + tl.load(entry_ptr + ABSENT_VALUE, mask=there, other=0), mask=there, other=0)
        lo = tl.load(entry_ptr + ABSENT_LO, mask=there, other=0)
        hi = tl.load(entry_ptr + ABSENT_HI, mask=there, other=0)
        absent = there & ((value < lo) | (value >= hi))
        counter = tl.load(entry_ptr + ABSENT_COUNTER, mask=there, other=0)
        tl.atomic_add(event_ptr + counter, 1, mask=absent, sem="release", scope="gpu")

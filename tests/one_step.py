"""An op that ends the launch after one step: the plan of the next one is the host's."""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.scheduler.device import CONTROL_LAST_EPOCH, CONTROL_STOP, signal, wait
from tri_mpk.scheduler.graph import Region, Task


@triton.jit
def one_step_tile(task, event_ptr, control_ptr, epoch, PORTABLE: tl.constexpr):
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    tl.store(control_ptr + CONTROL_STOP, epoch.to(tl.int64) * 0 + 1)
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))
    signal(task, event_ptr, PORTABLE)


def cut_one_step(
    machine: Machine, *, reads: tuple[Region, ...], after: TensorHandle, grid_dim: int | None = None
) -> Cut:
    """`after`: a tensor that it waits for, in the regions `reads`."""
    return Cut({}, {}, [Task(op=0, tile=(0,), reads=reads, writes=(), cost_bytes=8, fields={})])


ONE_STEP = Op("one_step", one_step_tile, cut_one_step, lambda: None, ends_step=True)

"""An op that ends steps whose plan is the host's: the same step again, until the launch's last one."""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.scheduler.device import CONTROL_LAST_EPOCH, CONTROL_LAST_STEP, CONTROL_STOP, signal
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import wait_for_any


@triton.jit
def repeat_step_tile(task, event_ptr, control_ptr, epoch, step, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP)
    wait_for_any(task, event_ptr, control_ptr, epoch, RANKS, PORTABLE)
    tl.store(control_ptr + CONTROL_STOP, (step >= last_step).to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))
    signal(task, event_ptr, PORTABLE)


def cut_repeat_step(
    machine: Machine, *, logits: TensorHandle, done: TensorHandle | None = None, grid_dim: int | None = None
) -> Cut:
    """`logits`: what it waits for; `done`: what the end of a step of several ranks waits for."""
    reads, writes = (logits.columns(0, logits.dims[1]),), (done.whole(),) if done else ()
    return Cut({}, {}, [Task(op=0, tile=(0,), reads=reads, writes=writes, cost_bytes=8, fields={})])


REPEAT_STEP = Op("repeat_step", repeat_step_tile, cut_repeat_step, lambda: None, waits_for_ranks=True, ends_step=True)

"""An op that ends steps whose plan is the host's: the same step again, until the launch's last one."""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.scheduler.device import CONTROL_LAST_EPOCH, CONTROL_LAST_STEP, CONTROL_STOP, signal, wait
from tri_mpk.scheduler.graph import Task


@triton.jit
def repeat_step_tile(task, event_ptr, control_ptr, epoch, step, PORTABLE: tl.constexpr):
    last_step = tl.load(control_ptr + CONTROL_LAST_STEP)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    tl.store(control_ptr + CONTROL_STOP, (step >= last_step).to(tl.int64))
    tl.store(control_ptr + CONTROL_LAST_EPOCH, epoch.to(tl.int64))
    signal(task, event_ptr, PORTABLE)


def cut_repeat_step(machine: Machine, *, logits: TensorHandle, grid_dim: int | None = None) -> Cut:
    """`logits`: what it waits for."""
    reads = (logits.columns(0, logits.dims[1]),)
    return Cut({}, {}, [Task(op=0, tile=(0,), reads=reads, writes=(), cost_bytes=8, fields={})])


REPEAT_STEP = Op("repeat_step", repeat_step_tile, cut_repeat_step, lambda: None, ends_step=True)

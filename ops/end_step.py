"""The end of a step of many sequences, told to all ranks: none begins the next one before all are done.

counters read
A single task, on several ranks only. `advance`, whose descriptor has no room for what a signal to all ranks needs,
signals to its own rank, and this task passes it on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Task
from tri_mpk.scheduler.peers import signal_ranks


@triton.jit
def end_step_tile(task, event_ptr, control_ptr, epoch, RANKS: tl.constexpr, PORTABLE: tl.constexpr):
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_end_step(machine: Machine, *, counters: TensorHandle, grid_dim: int | None = None) -> Cut:
    check_grid("end_step", grid_dim, 1, "one task")
    task = Task(op=0, tile=(0,), reads=(counters.whole(),), writes=(), cost_bytes=8, to_all_ranks=True)
    return Cut({}, {}, [task])


def end_step_torch() -> None:
    """It computes nothing."""


RANK_END_STEP = Op("end_step", end_step_tile, cut_end_step, end_step_torch)

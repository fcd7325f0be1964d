"""Whether this rank's host asks to stop, told to all ranks, so that all of them end after the same step.

mailbox read | asked [ranks] int32 pushed
A single task, of every rank's own. Reading the host's memory is a journey over the bus, so it is done every
STOP_INTERVAL steps, beside the first ops of a step. Argmax of all ranks finds the same answers and ends the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.argmax import MAILBOX_STOP, STOP_INTERVAL
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, check_grid
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Address, Region, Task
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def stop_request_tile(
    task, event_ptr, control_ptr, mailbox_ptr, epoch, step,
    asked_ptr,  # out
    place,
    RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    asks = step % STOP_INTERVAL == 0
    asked = tl.load(mailbox_ptr + MAILBOX_STOP, mask=asks, other=0, volatile=True) != 0
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    push(task, asked_ptr + place, asked.to(tl.int32), None, 4, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_stop_request(machine: Machine, *, output: TensorHandle, rank: int, grid_dim: int | None = None) -> Cut:
    check_grid("stop_request", grid_dim, 1, "one task")
    task = Task(
        op=0,
        tile=(0,),
        reads=(),
        writes=(),
        cost_bytes=8,
        fields={"asked_ptr": Address(output.name), "place": rank * output.dims[1]},
        pushes=(Region(output.name, ((0, 1),)),),
        to_all_ranks=True,
    )
    return Cut({}, {"asked_ptr": output}, [task])


def stop_request_torch(mailbox: torch.Tensor) -> torch.Tensor:
    return mailbox[MAILBOX_STOP.value] != 0


STOP_REQUEST = Op("stop_request", stop_request_tile, cut_stop_request, stop_request_torch)

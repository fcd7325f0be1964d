"""The sum of what all ranks have pushed, in the order of the ranks: y = parts[0] + parts[1] + ...

parts [ranks, N] read | y [N] written | arithmetic in fp32
The second half of an all-reduce, for vectors whose readers do not add up the parts themselves. One task = consecutive
elements, a worker's share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges, next_power_of_2
from tri_mpk.scheduler.device import signal
from tri_mpk.scheduler.graph import Address, Task
from tri_mpk.scheduler.peers import wait_for_ranks


@triton.jit
def add_parts_tile(
    task, event_ptr, control_ptr, epoch,
    parts_ptr, y_ptr,  # in, out
    first, num,
    N: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait_for_ranks(task, event_ptr, control_ptr, epoch, PORTABLE)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        total += tl.load(parts_ptr + rank * N + first + at, mask=at < num, other=0.0).to(tl.float32)
    tl.store(y_ptr + first + at, total.to(y_ptr.dtype.element_ty), mask=at < num)
    signal(task, event_ptr, PORTABLE)


def cut_add_parts(machine: Machine, *, input: TensorHandle, output: TensorHandle, grid_dim: int | None = None) -> Cut:
    num_ranks, size = input.dims
    num_tasks = min(size, grid_dim or machine.num_workers)
    tensors = {"parts_ptr": input, "y_ptr": output}
    cut = Cut({"N": size, "BLOCK": next_power_of_2(-(-size // num_tasks))}, tensors)
    for i, (lo, hi) in enumerate(even_ranges(size, num_tasks)):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(input.box((0, num_ranks), (lo, hi)),),
                writes=(output.span(lo, hi),),
                cost_bytes=num_ranks * (hi - lo) * input.dtype.itemsize,
                fields={name: Address(tensor.name) for name, tensor in tensors.items()} | {"first": lo, "num": hi - lo},
            )
        )
    return cut


def add_parts_torch(parts: torch.Tensor) -> torch.Tensor:
    return parts.float().sum(0)


ADD_PARTS = Op("add_parts", add_parts_tile, cut_add_parts, add_parts_torch, waits_for_ranks=True)

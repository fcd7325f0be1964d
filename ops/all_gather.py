"""Every rank's x, on all ranks: y[rank] = x.

x [N] read | y [ranks, N] pushed
One task = consecutive elements, a worker's share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, even_ranges, next_power_of_2
from tri_mpk.ops.parts import push_to_all
from tri_mpk.scheduler.device import wait
from tri_mpk.scheduler.graph import Address, Task
from tri_mpk.scheduler.peers import push, signal_ranks


@triton.jit
def all_gather_tile(
    task, event_ptr, control_ptr, epoch,
    x_ptr, y_ptr,  # in, out
    row_of_rank, first, num,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, RANKS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + at, mask=at < num, other=0.0)
    push(task, y_ptr + row_of_rank + first + at, x.to(y_ptr.dtype.element_ty), at < num, SIZE, RANKS, PORTABLE)
    signal_ranks(task, event_ptr, RANKS, PORTABLE)


def cut_all_gather(
    machine: Machine, *, input: TensorHandle, output: TensorHandle, rank: int, grid_dim: int | None = None
) -> Cut:
    size = input.numel
    num_tasks = min(size, grid_dim or machine.num_workers)
    tensors = {"x_ptr": input, "y_ptr": output}
    cut = Cut({"BLOCK": next_power_of_2(-(-size // num_tasks)), "SIZE": output.dtype.itemsize}, tensors)
    for i, (lo, hi) in enumerate(even_ranges(size, num_tasks)):
        cut.tasks.append(
            Task(
                op=0,
                tile=(i,),
                reads=(input.span(lo, hi),),
                writes=(output.span(lo, hi),),
                cost_bytes=(hi - lo) * input.dtype.itemsize,
                fields={name: Address(tensor.name) for name, tensor in tensors.items()}
                | {"row_of_rank": rank * size, "first": lo, "num": hi - lo},
            )
        )
    return push_to_all(cut, output)


def all_gather_torch(inputs: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(inputs)


ALL_GATHER = Op("all_gather", all_gather_tile, cut_all_gather, all_gather_torch)

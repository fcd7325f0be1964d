"""Layers of tasks that read as many blocks of memory as a tensor on the device says: the workload of --uneven.

As attention over sequences of different lengths does. Sizes have a Pareto distribution; the host takes all tasks for
equal, or knows the sizes. See policies.py beside this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.persistent_kernel import PersistentKernel
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, Task

NUM_LAYERS, TASKS_PER_WORKER = 8, 16
PARETO_SHAPE, MIN_BLOCKS, MAX_BLOCKS = 1.2, 8, 128  # of a task
BLOCK = 8192  # elements, 32 KiB


@triton.jit
def uneven_tile(
    task, event_ptr, control_ptr, epoch,
    x_ptr, sizes_ptr, blocks_ptr, y_ptr,  # in, in, in, out
    tile, first,
    T: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """y[tile] = x[tile + 1] / 2 + the sum of sizes[tile] blocks, from block `first` on."""
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(sizes_ptr + tile)):
        total += tl.load(blocks_ptr + (first + i).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tile, tl.sum(total, axis=0) + tl.load(x_ptr + (tile + 1) % T) / 2)
    signal(task, event_ptr, PORTABLE)


def cut_uneven(
    machine: Machine,
    *,
    x: TensorHandle,
    sizes: TensorHandle,
    blocks: TensorHandle,
    y: TensorHandle,
    first: list[int],
    cost: list[int],
    grid_dim: int | None = None,
) -> Cut:
    tensors = {"x_ptr": x, "sizes_ptr": sizes, "blocks_ptr": blocks, "y_ptr": y}
    cut = Cut({"T": x.numel, "BLOCK": blocks.dims[1]}, tensors)
    pointers = {name: Address(tensor.name) for name, tensor in tensors.items()}
    reads = (x.whole(), sizes.whole(), blocks.whole())  # all of x: a layer begins when the one before has ended
    for t in range(x.numel):
        fields = pointers | {"tile": t, "first": first[t]}
        cut.tasks.append(Task(0, (t,), reads, (y.span(t, t + 1),), cost[t], fields=fields))
    return cut


def uneven_torch(x: Tensor, sizes: Tensor, blocks: Tensor) -> Tensor:
    owner = torch.arange(len(sizes), device=x.device).repeat_interleave(sizes.long())
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=x.device)
    return (x.roll(-1).double() / 2 + sums.index_add(0, owner, blocks.double().sum(1))).float()


UNEVEN = Op("uneven", uneven_tile, cut_uneven, uneven_torch)


def draw_sizes(num_tasks: int, seed: int) -> Tensor:
    uniform = torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed))
    return (MIN_BLOCKS * (1 - uniform) ** (-1 / PARETO_SHAPE)).clamp(max=MAX_BLOCKS).to(torch.int32)


def build_uneven(
    x: Tensor, sizes: Tensor, blocks: Tensor, num_tokens: int, policy: str, known: bool, num_workers: int | None = None
) -> PersistentKernel:
    """A kernel whose step is NUM_LAYERS layers, from x to x. `known`: the host deals tasks out by their real sizes.

    Tasks of the first layer wait for nothing, so they are static with any policy.
    """
    device = x.device
    step, tokens = (
        torch.zeros(n, dtype=d, device=device) for n, d in ((1, torch.int32), (num_tokens + 1, torch.int64))
    )
    mpk = PersistentKernel(num_workers=num_workers, meta_tensors=[step, tokens], policy=policy)
    options = {"first": (sizes.cumsum(0) - sizes).tolist()}
    options["cost"] = (sizes if known else torch.ones_like(sizes)).tolist()
    handles = [mpk.attach_input(x, "x"), mpk.attach_input(torch.zeros_like(x), "y")]
    common = {"sizes": mpk.attach_input(sizes.to(device), "sizes"), "blocks": mpk.attach_input(blocks, "blocks")}
    for layer in range(NUM_LAYERS):
        x_in, y_out = handles[layer % 2], handles[1 - layer % 2]
        mpk.op_layer(UNEVEN, x=x_in, y=y_out, **common, options=options, label=f"L{layer:02d} uneven")
    # a step ends with argmax, here of nothing
    nothing = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    best = tuple(mpk.attach_input(t, name=f"best.{i}") for i, t in enumerate(nothing))
    mpk.argmax_layer(input=best, policy="static")
    return mpk


def run_uneven(mpk: PersistentKernel, num_tokens: int) -> float:
    mpk.step.data.zero_()
    mpk(num_tokens=1, max_new_tokens=num_tokens)
    return mpk.runtime.last_launch_ms / num_tokens

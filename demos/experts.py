"""A mixture of experts in one persistent kernel: who waits for whom is decided by numbers that the kernel computes.

    python demos/experts.py

A router picks an expert for every token, or none. Each step's choice is another one, and one compiled kernel serves
all: a token's `dispatch` signals the counter of its expert, an `expert` waits for its own tokens only, and a token's
`combine` waits for its own expert only. No wait is written down here: the ops say what they read and write in steps
with which id (`Guard`), and the scheduler derives event tensors from that and proves them for all ids.
"""

from __future__ import annotations

import argparse
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

import tri_mpk
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle, next_power_of_2
from tri_mpk.scheduler.by_value import announce, signal_by_value, wait_by_value
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, EventUse, Guard, Region, Task, Value

NUM_TOKENS, NUM_EXPERTS, HIDDEN_SIZE = 5, 4, 32
MAX_STEPS = 64


# ---- router: ids[t] = the expert with the highest score, or NUM_EXPERTS (nobody) if no score is positive ----


@triton.jit
def router_tile(
    task, event_ptr, control_ptr, epoch,
    x_ptr, router_ptr, ids_ptr,  # in, in, out
    announced,
    T: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    experts, cols = tl.arange(0, BLOCK_E), tl.arange(0, D)
    router = tl.load(router_ptr + experts[:, None] * D + cols[None, :], mask=experts[:, None] < E, other=0.0)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for t in range(T):
        x = tl.load(x_ptr + t * D + cols)
        score = tl.where(experts < E, tl.sum(router * x[None, :], axis=1), 0.0)
        best = tl.max(score, axis=0)
        chosen = tl.min(tl.where(score == best, experts, E), axis=0)
        tl.store(ids_ptr + t, tl.where(best > 0, chosen, E))
    announce(ids_ptr, announced, event_ptr)
    signal(task, event_ptr, PORTABLE)


def cut_router(
    machine: Machine, *, x: TensorHandle, router: TensorHandle, ids: TensorHandle, grid_dim: int | None = None
) -> Cut:
    (num_tokens, hidden_size), num_experts = x.dims, router.dims[0]
    values = id_values(ids, num_experts)
    constants = {"T": num_tokens, "E": num_experts, "BLOCK_E": next_power_of_2(num_experts + 1), "D": hidden_size}
    tensors = {"x_ptr": x, "router_ptr": router, "ids_ptr": ids}
    fields = {name: Address(tensor.name) for name, tensor in tensors.items()} | {"announced": EventUse("announce")}
    one = Task(0, (0,), (x.whole(), router.whole()), (ids.whole(),), 4 * router.numel, fields=fields)
    one.announces = tuple(values)
    return Cut(constants, tensors, [one], values)


def id_values(ids: TensorHandle, num_experts: int) -> dict[str, Value]:
    return {f"{ids.name}[{t}]": Value(ids.span(t, t + 1), 0, num_experts + 1) for t in range(ids.numel)}


# ---- dispatch: xin[t] = x[t] / rms(x[t]), for the expert of token t ----


@triton.jit
def dispatch_tile(
    task, event_ptr, control_ptr, epoch,
    x_ptr, ids_ptr, xin_ptr,  # in, in, out
    token, signals,
    D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, D)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    x = tl.load(x_ptr + token * D + cols)
    tl.store(xin_ptr + token * D + cols, x * tl.rsqrt(tl.sum(x * x, axis=0) / D + 1e-6))
    signal_by_value(tl.load(ids_ptr + token), signals, event_ptr, PORTABLE)
    signal(task, event_ptr, PORTABLE)


def cut_dispatch(
    machine: Machine, *, x: TensorHandle, ids: TensorHandle, xin: TensorHandle, grid_dim: int | None = None
) -> Cut:
    num_tokens, d = x.dims
    cut = Cut({"D": d}, {"x_ptr": x, "ids_ptr": ids, "xin_ptr": xin})
    for t in range(num_tokens):
        fields = {name: Address(tensor.name) for name, tensor in cut.pointers.items()} | {"token": t}
        fields["signals"] = EventUse("signal", f"{ids.name}[{t}]")
        reads = (x.span(t * d, (t + 1) * d), ids.span(t, t + 1))
        cut.tasks.append(Task(0, (t,), reads, (xin.span(t * d, (t + 1) * d),), 4 * d, fields=fields))
    return cut


# ---- expert: y[t] = weight[expert] @ xin[t] for the tokens whose expert it is ----


@triton.jit
def expert_tile(
    task, event_ptr, control_ptr, epoch,
    xin_ptr, ids_ptr, experts_ptr, y_ptr,  # in, in, in, out
    expert,
    T: tl.constexpr, D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, D), tl.arange(0, D)
    weight = tl.load(experts_ptr + expert * D * D + rows[:, None] * D + cols[None, :])
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    for t in range(T):
        if tl.load(ids_ptr + t) == expert:
            x = tl.load(xin_ptr + t * D + cols)
            tl.store(y_ptr + t * D + rows, tl.sum(weight * x[None, :], axis=1))
    signal(task, event_ptr, PORTABLE)


def cut_expert(
    machine: Machine,
    *,
    xin: TensorHandle,
    ids: TensorHandle,
    experts: TensorHandle,
    y: TensorHandle,
    grid_dim: int | None = None,
) -> Cut:
    num_tokens, d = xin.dims
    cut = Cut({"T": num_tokens, "D": d}, {"xin_ptr": xin, "ids_ptr": ids, "experts_ptr": experts, "y_ptr": y})
    for e in range(experts.dims[0]):
        chosen = [Guard(f"{ids.name}[{t}]", e, e + 1) for t in range(num_tokens)]
        rows = [((0, 1), (t * d, (t + 1) * d)) for t in range(num_tokens)]
        reads = [Region(xin.name, row, guard) for row, guard in zip(rows, chosen, strict=True)]
        writes = [Region(y.name, row, guard) for row, guard in zip(rows, chosen, strict=True)]
        fields = {name: Address(tensor.name) for name, tensor in cut.pointers.items()} | {"expert": e}
        weight = experts.span(e * d * d, (e + 1) * d * d)
        cut.tasks.append(Task(0, (e,), (ids.whole(), weight, *reads), tuple(writes), 4 * d * d, fields=fields))
    return cut


# ---- combine: x[t] += y[t] if token t has an expert ----


@triton.jit
def combine_tile(
    task, event_ptr, control_ptr, epoch,
    ids_ptr, y_ptr, x_ptr,  # in, in, in and out
    token, waits,
    E: tl.constexpr, D: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, D)
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    expert = tl.load(ids_ptr + token)
    wait_by_value(expert, waits, task, event_ptr, control_ptr, epoch, PORTABLE)
    x = tl.load(x_ptr + token * D + cols)
    y = tl.load(y_ptr + token * D + cols, mask=cols < tl.where(expert < E, D, 0), other=0.0)
    tl.store(x_ptr + token * D + cols, x + y)
    signal(task, event_ptr, PORTABLE)


def cut_combine(
    machine: Machine,
    *,
    ids: TensorHandle,
    y: TensorHandle,
    x: TensorHandle,
    num_experts: int,
    grid_dim: int | None = None,
) -> Cut:
    num_tokens, d = x.dims
    cut = Cut({"E": num_experts, "D": d}, {"ids_ptr": ids, "y_ptr": y, "x_ptr": x})
    for t in range(num_tokens):
        name, row = f"{ids.name}[{t}]", x.span(t * d, (t + 1) * d)
        fields = {name: Address(tensor.name) for name, tensor in cut.pointers.items()} | {"token": t}
        fields["waits"] = EventUse("wait", name)
        routed = Region(y.name, row.box, Guard(name, 0, num_experts))
        cut.tasks.append(Task(0, (t,), (ids.span(t, t + 1), routed, row), (row,), 12 * d, fields=fields))
    return cut


# ---- the model ----


def mixture_torch(x: Tensor, router: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """(x after one step, ids)."""
    best, ids = (x @ router.T).max(dim=-1)
    ids = torch.where(best > 0, ids, len(experts))
    xin = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    routed = ids < len(experts)
    y = torch.zeros_like(x)
    y[routed] = torch.einsum("tij,tj->ti", experts[ids[routed]], xin[routed])
    return x + y, ids


ROUTER = Op("router", router_tile, cut_router, mixture_torch)
DISPATCH = Op("dispatch", dispatch_tile, cut_dispatch, mixture_torch)
EXPERT = Op("expert", expert_tile, cut_expert, mixture_torch)
COMBINE = Op("combine", combine_tile, cut_combine, mixture_torch)


def build(
    x: Tensor, router: Tensor, experts: Tensor, num_workers: int | None = None
) -> tuple[tri_mpk.PersistentKernel, Tensor]:
    """A kernel whose every step is one pass through the layer, and the ids it leaves."""
    device = x.device
    step, tokens = (torch.zeros(n, dtype=d, device=device) for n, d in ((1, torch.int32), (MAX_STEPS, torch.int64)))
    mpk = tri_mpk.PersistentKernel(num_workers=num_workers, meta_tensors=[step, tokens])
    ids = torch.zeros(len(x), dtype=torch.int32, device=device)
    handles = {"x": x, "router": router, "experts": experts, "ids": ids}
    x, router, experts, routed = (mpk.attach_input(tensor, name=name) for name, tensor in handles.items())
    xin, y = (mpk.new_tensor(x.dims, torch.float32, name=name) for name in ("xin", "y"))
    mpk.op_layer(ROUTER, x=x, router=router, ids=routed)
    mpk.op_layer(DISPATCH, x=x, ids=routed, xin=xin)
    mpk.op_layer(EXPERT, xin=xin, ids=routed, experts=experts, y=y)
    mpk.op_layer(COMBINE, ids=routed, y=y, x=x, options={"num_experts": experts.dims[0]})
    # a step ends with argmax, here of nothing
    nothing = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    mpk.argmax_layer(input=tuple(mpk.attach_input(t, name=f"best.{i}") for i, t in enumerate(nothing)))
    return mpk, ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(args.seed)
    dims = [(NUM_TOKENS, HIDDEN_SIZE), (NUM_EXPERTS, HIDDEN_SIZE), (NUM_EXPERTS, HIDDEN_SIZE, HIDDEN_SIZE)]
    x, router, experts = (torch.randn(d, generator=generator).to(device) for d in dims)
    experts *= HIDDEN_SIZE**-0.5
    expected = x.clone()
    mpk, ids = build(x, router, experts)
    mpk.compile()
    program = mpk.program
    print(f"{mpk.num_workers} workers: {program.report}")
    for tensor in program.events.tensors:
        print(f"  event tensor {tensor}")
    print(f"kernel: {mpk.runtime.source_path}")
    same = True
    for step in range(args.steps):
        mpk(num_tokens=step + 1, max_new_tokens=1)
        expected, expected_ids = mixture_torch(expected, router, experts)
        error = float((x - expected).abs().max())
        same &= error < 1e-3 and ids.tolist() == expected_ids.tolist()
        print(f"step {step}: experts {ids.tolist()} (torch: {expected_ids.tolist()}), largest difference {error:.1e}")
    print("equal to torch" if same else "DIFFERS from torch")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

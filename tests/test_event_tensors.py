"""Waits and signals by a value in real kernels on CPU workers: experts by id, and as many tiles as a step has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl

from tri_mpk import MegakernelTimeout, PersistentKernel
from tri_mpk.ops.op import Cut, Machine, Op, TensorHandle
from tri_mpk.scheduler.by_value import announce, signal_by_value
from tri_mpk.scheduler.descriptor import EVENT_STRIDE
from tri_mpk.scheduler.device import signal, wait
from tri_mpk.scheduler.graph import Address, EventUse, Guard, Region, Task, Value

ROOT = Path(__file__).resolve().parents[1]


def demo(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / f"demos/{name}.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mixture = demo("experts")

# ---- a mixture of experts: demos/experts.py ----


class Mixture:
    def __init__(self, seed: int, num_workers: int = 3):
        generator = torch.Generator().manual_seed(seed)
        x, router, self.experts = (torch.randn(dims, generator=generator) for dims in [(5, 16), (4, 16), (4, 16, 16)])
        self.experts /= 4
        self.x, self.router, self.expected = x, router, x.clone()
        self.mpk, self.ids = mixture.build(self.x, self.router, self.experts, num_workers)
        self.mpk.compile()
        self.seen: set[int] = set()

    def step(self, number: int) -> None:
        self.mpk(num_tokens=number + 1, max_new_tokens=1)
        self.expected, ids = mixture.mixture_torch(self.expected, self.router, self.experts)
        assert self.ids.tolist() == ids.tolist()
        torch.testing.assert_close(self.x, self.expected, rtol=1e-4, atol=1e-4)
        self.seen.update(ids.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_one_kernel_serves_all_ids(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRI_MPK_TEST_DELAYS", str(seed))
    made = Mixture(seed)
    for step in range(6):
        made.step(step)
    assert len(made.seen) >= 3  # of 5, nobody included


def test_all_steps_in_one_launch_and_counters_that_wrap_around():
    made = Mixture(0)
    made.mpk.runtime.set_epoch(2**31 - 3)
    made.mpk(num_tokens=1, max_new_tokens=6)
    expected = made.expected
    for _ in range(6):
        expected, ids = mixture.mixture_torch(expected, made.router, made.experts)
    torch.testing.assert_close(made.x, expected, rtol=1e-4, atol=1e-4)
    runtime = made.mpk.runtime
    counters = made.mpk.program.counters.before(runtime.next_epoch)
    assert torch.equal(runtime.events, torch.from_numpy(counters))  # whatever the ids were, each got its count


def test_waits_are_written_against_event_tensors():
    """dispatch -> expert has a counter per expert, which the id chooses; so has expert -> combine."""
    program = Mixture(1).mpk.program
    tensors = {(t.producer.rsplit("_")[0], t.consumer.rsplit("_")[0]): t for t in program.events.tensors[:4]}
    dispatched, done = tensors["dispatch", "expert"], tensors["expert", "combine"]
    assert dispatched.size == done.size == 4
    tables = program.counters.tables
    for index, task in enumerate(program.graph.tasks):
        name = program.variants[task.variant].op.name
        if name in ("dispatch", "combine"):
            kind, tensor = ("signal", dispatched) if name == "dispatch" else ("wait", done)
            place = tables.place(index, EventUse(kind, f"ids[{task.tile[0]}]")) - tables.start
            size, lo, hi, first, stride, _ = tables.words[place : place + 6]
            assert (size, lo, hi, first, stride) == (1, 0, 4, tensor.first * EVENT_STRIDE, EVENT_STRIDE)
        if name == "expert":  # a constant coordinate is a constant in the descriptor
            assert program.events.wait[index] == dispatched.first + task.tile[0]
            assert index not in program.events.wait_if


def test_a_lost_signal_by_value_is_named():
    made = Mixture(0)
    made.mpk.runtime.wait_bound_s = 0.2
    program = made.mpk.program
    done = next(t for t in program.events.tensors if t.producer.startswith("expert"))
    chosen = int(mixture.mixture_torch(made.x, made.router, made.experts)[1][0])
    made.mpk.runtime.events[(done.first + chosen) * EVENT_STRIDE] -= 1
    with pytest.raises(MegakernelTimeout) as caught:
        made.mpk(num_tokens=1, max_new_tokens=1)
    assert caught.value.op == "combine" and caught.value.event == done.first + chosen
    assert f"expert_2 t{chosen}" in caught.value.root_cause


def test_a_tile_function_without_a_field_for_its_value_is_refused():
    made = Mixture(0)
    program = made.mpk.program
    task = next(t for t in program.graph.tasks if "waits" in t.fields)
    task.fields["waits"] = 0
    with pytest.raises(ValueError, match=r"combine_3 t0 has to wait by ids\[0\], but its tile function has no field"):
        program.pack()


# ---- a symbolic extent: n tiles of this step ----

NUM_TILES, TILE = 6, 8


@triton.jit
def extent_tile(
    task, event_ptr, control_ptr, epoch, step,
    lengths_ptr, n_ptr, announced,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    tl.store(n_ptr, tl.load(lengths_ptr + step))
    announce(n_ptr, announced, event_ptr)
    signal(task, event_ptr, PORTABLE)


@triton.jit
def part_tile(
    task, event_ptr, control_ptr, epoch, step,
    x_ptr, n_ptr, parts_ptr, tile, signals,
    TILE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    n = tl.load(n_ptr)
    if tile < n:
        tl.store(parts_ptr + tile, tl.sum(tl.load(x_ptr + tile * TILE + tl.arange(0, TILE)), axis=0) * (step + 1))
    signal_by_value(n, signals, event_ptr, PORTABLE)
    signal(task, event_ptr, PORTABLE)


@triton.jit
def total_tile(
    task, event_ptr, control_ptr, epoch, step,
    parts_ptr, n_ptr, out_ptr,
    BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    wait(task, event_ptr, control_ptr, epoch, PORTABLE)
    tiles = tl.arange(0, BLOCK)
    tl.store(out_ptr + step, tl.sum(tl.load(parts_ptr + tiles, mask=tiles < tl.load(n_ptr), other=0.0), axis=0))
    signal(task, event_ptr, PORTABLE)


def addresses(**tensors: TensorHandle) -> dict[str, Address]:
    return {name: Address(tensor.name) for name, tensor in tensors.items()}


def cut_extent(machine: Machine, *, lengths: TensorHandle, n: TensorHandle, grid_dim: int | None = None) -> Cut:
    tensors = {"lengths_ptr": lengths, "n_ptr": n}
    fields = addresses(**tensors) | {"announced": EventUse("announce")}
    one = Task(0, (0,), (lengths.whole(),), (n.whole(),), 4, fields=fields, announces=("n",))
    return Cut({}, tensors, [one], {"n": Value(n.span(0, 1), 0, NUM_TILES + 1)})


def active(tile: int) -> Guard:
    return Guard("n", tile + 1, NUM_TILES + 1)


def cut_part(
    machine: Machine, *, x: TensorHandle, n: TensorHandle, parts: TensorHandle, grid_dim: int | None = None
) -> Cut:
    cut = Cut({"TILE": TILE}, {"x_ptr": x, "n_ptr": n, "parts_ptr": parts})
    for tile in range(NUM_TILES):
        fields = addresses(**cut.pointers) | {"tile": tile, "signals": EventUse("signal", "n")}
        written = Region(parts.name, parts.span(tile, tile + 1).box, active(tile))
        cut.tasks.append(Task(0, (tile,), (x.whole(), n.whole()), (written,), 4 * TILE, fields=fields))
    return cut


def cut_total(
    machine: Machine, *, parts: TensorHandle, n: TensorHandle, out: TensorHandle, grid_dim: int | None = None
) -> Cut:
    tensors = {"parts_ptr": parts, "n_ptr": n, "out_ptr": out}
    reads = tuple(Region(parts.name, parts.span(t, t + 1).box, active(t)) for t in range(NUM_TILES))
    one = Task(0, (0,), (n.whole(), *reads), (out.whole(),), 4, fields=addresses(**tensors))
    return Cut({"BLOCK": 8}, tensors, [one])


EXTENT = Op("extent", extent_tile, cut_extent, torch.sum)
PART = Op("part", part_tile, cut_part, torch.sum)
TOTAL = Op("total", total_tile, cut_total, torch.sum)


@pytest.mark.parametrize("seed", range(2))
def test_as_many_tiles_as_the_step_has(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRI_MPK_TEST_DELAYS", str(seed))
    step, tokens = torch.zeros(1, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)
    mpk = PersistentKernel(num_workers=3, meta_tensors=[step, tokens])
    x, out = torch.randn(NUM_TILES * TILE), torch.full((16,), torch.nan)
    lengths = torch.tensor([3, 6, 0, 1, 5, 2, 6, 4], dtype=torch.int32)
    handles = {"x": x, "lengths": lengths, "out": out}
    x_in, lengths_in, out_in = (mpk.attach_input(tensor, name=name) for name, tensor in handles.items())
    n = mpk.new_tensor((1,), torch.int32, name="count")
    parts = mpk.new_tensor((NUM_TILES,), torch.float32, name="parts")
    mpk.op_layer(EXTENT, lengths=lengths_in, n=n)
    mpk.op_layer(PART, x=x_in, n=n, parts=parts)
    mpk.op_layer(TOTAL, parts=parts, n=n, out=out_in)
    best = (torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    mpk.argmax_layer(input=tuple(mpk.attach_input(tensor, name=f"best.{i}") for i, tensor in enumerate(best)))
    mpk.compile()
    program = mpk.program
    assert program.report.num_steps == NUM_TILES + 1
    (total,) = (i for i, task in enumerate(program.graph.tasks) if program.graph.ops[task.op].startswith("total"))
    assert total not in program.events.wait_if  # one counter, of which n signals come from tiles
    assert program.events.events[program.events.wait[total]].count == NUM_TILES
    mpk.runtime.set_epoch(2**31 - 4)
    mpk(num_tokens=1, max_new_tokens=len(lengths))
    sums = x.view(NUM_TILES, TILE).sum(1)
    expected = torch.stack([(i + 1) * sums[:n].sum() for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(out[: len(lengths)], expected)


# ---- ahead of time, for a GPU ----

COMPILED = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import experts
from tri_mpk.aot import compile_for, resources
from tri_mpk.generator import write_source
dims = (5, 32), (4, 32), (4, 32, 32)
mpk, _ = experts.build(*(torch.empty(d, device="meta") for d in dims), num_workers=8)
kernel = compile_for(write_source(mpk.plan().source), "sm_90")
ptx = kernel.asm["ptx"]
print(json.dumps(resources(kernel) | {"by_thread": ptx.count("@!p red.release.gpu.global.add.u32")}))
"""


def test_the_kernel_compiles_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, str(ROOT / "demos")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["spills"] == 0 and report["by_thread"] == 1


def test_the_demo_equals_torch():
    result = subprocess.run(
        [sys.executable, str(ROOT / "demos/experts.py"), "--steps", "2"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "equal to torch" in result.stdout, result.stdout + result.stderr


def test_dense_kernels_have_nothing_of_it():
    """Static decode is the case in which all coordinates are constants: the golden source knows no values."""
    source = (ROOT / "tests/golden/megakernel_small.py").read_text()
    assert "by_value" not in source and "announce" not in source

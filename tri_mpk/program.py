"""Plan: from a list of op calls to a verified, scheduled program and its kernel source. Needs no device."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from tri_mpk.errors import DeviceError
from tri_mpk.generator import KernelConstants, Variant, field_names, generate, task_words
from tri_mpk.ops.gemv import MAX_SLOTS, RING_OFFSET, SCRATCH_BYTES, STREAM_BYTES
from tri_mpk.ops.op import TENSOR_MAP_WORDS, TENSOR_MAPS, Machine, OpCall, Policy, TensorHandle, TensorMap, TensorMaps
from tri_mpk.ops.panels import OTHER_BYTES, PANEL_STATE_BYTES, RINGS_BYTES
from tri_mpk.scheduler.descriptor import CounterLayout, PackedQueues, pack
from tri_mpk.scheduler.device import SHARED_BYTES
from tri_mpk.scheduler.events import derive_events
from tri_mpk.scheduler.garbage import without_garbage_collection
from tri_mpk.scheduler.graph import Events, Schedule, TaskGraph, TensorInfo
from tri_mpk.scheduler.queues import schedule
from tri_mpk.scheduler.ranks import derive_rank_events, symmetric_info, verify_ranks, waits_for_ranks
from tri_mpk.scheduler.verify import Report, verify
from tri_mpk.tuning import Tuning

NUM_WARPS = 16
LEAST_SLOTS = 3  # of a weight ring: one that is read, one that waits to be refilled, one on its way
COMPILE_OPTIONS = {
    "num_warps": NUM_WARPS,
    "maxnreg": 65536 // (32 * NUM_WARPS),  # all there are: else ptxas may spill to make room for a second block
    "launch_cooperative_grid": True,
}


@dataclass(slots=True)
class Program:
    """All that is known about a kernel before it meets a device."""

    graph: TaskGraph
    events: Events
    schedule: Schedule
    report: Report
    variants: list[Variant]
    constants: KernelConstants
    tuning: Tuning
    tensors: dict[str, TensorHandle]
    counters: CounterLayout
    source: str
    seconds: float  # that planning took
    maps: list[TensorMap]  # in the order of the tensor that holds them
    rank: int = 0

    @property
    def num_workers(self) -> int:
        return len(self.schedule.queues)

    @without_garbage_collection()
    def pack(self) -> PackedQueues:
        return pack(
            self.graph,
            self.events,
            self.schedule,
            task_words((v.op for v in self.variants), self.constants.profile, self.num_ranks),
            [field_names(v.op) for v in self.variants],
            {name: tensor.dtype.itemsize for name, tensor in self.tensors.items()},
            self.rank,
            self.num_ranks,
        )

    @property
    def num_ranks(self) -> int:
        return self.constants.ranks

    @property
    def symmetric_tensors(self) -> list[TensorHandle]:
        return [tensor for tensor in self.tensors.values() if tensor.symmetric]


def kernel_constants(
    weight_dtype: torch.dtype,
    row_lengths: list[int],
    portable: bool,
    has_bulk_copies: bool,
    profile: bool = False,
    pools: bool = False,
    prefetch_bytes: int = 0,
    ranks: int = 1,
) -> KernelConstants:
    """Tile sizes: a warp per row and 16 bytes of bf16 per lane on a GPU, few large tiles in the interpreter."""
    align = 16 // weight_dtype.itemsize
    ring = has_bulk_copies and weight_dtype.itemsize == 2 and not any(length % align for length in row_lengths)
    block_n, block_k = (256, 64) if portable else (NUM_WARPS, 256)
    if not ring:
        prefetch_bytes = 0
    return KernelConstants(
        weight_dtype, ring, block_n, block_k, portable, profile, pools,
        prefetch_bytes=prefetch_bytes, ranks=ranks,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SharedMemoryPlan:
    """How a block's dynamic shared memory is divided: the compiler's own, then sums and the weight ring."""

    base: int  # behind the compiler's own and the table of streams
    ring_slots: int
    slot_bytes: int
    num_bytes: int

    @classmethod
    def divide(cls, program: Program, compiler_bytes: int, limit: int) -> SharedMemoryPlan:
        """As many slots as fit under `limit`. Raises DeviceError when not even three do, or what the compiler wants."""
        streams = [task.stream for task in program.graph.tasks if task.stream]
        if not program.constants.ring or not streams:
            base, state_bytes = compiler_bytes, 0
            if program.maps:  # rings lie where some of the compiler's is, too
                base, state_bytes = max(base, OTHER_BYTES.value + 1024 + RINGS_BYTES.value), PANEL_STATE_BYTES.value
            base = -(-base // 128) * 128
            num_bytes = base + SHARED_BYTES.value + state_bytes
            if num_bytes > limit:
                raise DeviceError(f"the kernel needs {num_bytes} bytes of shared memory, but a block has {limit} here")
            return cls(base, 0, 0, num_bytes)
        slot = program.constants.slot_bytes
        queues = program.schedule.static_queues()
        num_streams = max(sum(program.graph.tasks[t].stream is not None for t in queue) for queue in queues)
        base = -(-(compiler_bytes + num_streams * STREAM_BYTES.value) // 128) * 128
        fixed = base + RING_OFFSET.value + SCRATCH_BYTES.value
        slots = min((limit - fixed) // slot, MAX_SLOTS.value)
        if slots < LEAST_SLOTS:
            raise DeviceError(
                f"{limit} bytes of shared memory hold {max(slots, 0)} slots of {slot} bytes beside {fixed} others, but"
                f" the weight ring needs {LEAST_SLOTS}; this model's rows are too long for this GPU"
            )
        return cls(base, slots, slot, fixed + slots * slot)


@without_garbage_collection()
def plan(
    calls: list[OpCall],
    tensors: dict[str, TensorHandle],
    tuning: Tuning,
    constants: KernelConstants,
    rank: int = 0,
    panels: bool = False,
) -> Program:
    """Cuts, derives events, schedules, verifies and generates. Raises ScheduleError if the graph is not safe."""
    started = time.perf_counter()
    maps = TensorMaps() if panels else None
    machine = Machine(tuning.num_workers, constants.block_n, tuning.slot_bytes if constants.ring else 0, maps)
    graph = TaskGraph()
    variants: dict[Variant, int] = {}
    for op_idx, call in enumerate(calls):
        cut = call.op.cut(machine, **call.tensors, **call.options, grid_dim=call.grid_dim)
        variant = Variant(
            call.op,
            tuple(cut.constants.items()),
            tuple((name, tensor.dtype) for name, tensor in cut.pointers.items()),
        )
        index = variants.setdefault(variant, len(variants))
        graph.ops.append(call.label)
        for task in cut.tasks:
            task.op, task.variant = op_idx, index
        graph.tasks += cut.tasks
        graph.values |= cut.values
    if maps and maps.places:
        if TENSOR_MAPS in tensors:
            raise ValueError(f"the name {TENSOR_MAPS!r} is the kernel's own; call that tensor something else")
        tensors[TENSOR_MAPS] = TensorHandle(TENSOR_MAPS, (len(maps.places) * TENSOR_MAP_WORDS,), torch.int64)
    graph.tensors = {name: TensorInfo((1, tensor.numel), tensor.data is not None) for name, tensor in tensors.items()}
    num_ranks = constants.ranks
    graph.tensors |= {name: symmetric_info(num_ranks, t.numel) for name, t in tensors.items() if t.symmetric}
    events = derive_events(graph) if num_ranks == 1 else derive_rank_events(graph, num_ranks)
    dynamic = [op for op, call in enumerate(calls) if call.policy is Policy.DYNAMIC]
    queues = schedule(graph, events, tuning.num_workers, dynamic)
    if num_ranks == 1:
        report = verify(graph, events, queues)
    else:
        check_waits(graph, events, list(variants))
        report = verify_ranks(graph, events, queues, num_ranks)
    counters = CounterLayout(events, queues, graph.values)
    if constants.ring:
        rows = max((2 * task.stream.slot_rows * task.stream.cols for task in graph.tasks if task.stream), default=1)
        constants = replace(constants, slot_bytes=-(-rows // 128) * 128)
    source = generate(list(variants), constants)
    seconds = time.perf_counter() - started
    return Program(
        graph, events, queues, report, list(variants), constants, tuning, tensors, counters, source, seconds,
        list(maps.places) if maps else [], rank,
    )  # fmt: skip


def check_waits(graph: TaskGraph, events: Events, variants: list[Variant]) -> None:
    """Signals of other ranks are seen only by tile functions that look for them."""
    for index, task in enumerate(graph.tasks):
        if waits_for_ranks(graph, events, index) and not variants[task.variant].op.waits_for_ranks:
            raise ValueError(
                f"{graph.task_name(index)} depends on tasks of other ranks, but {variants[task.variant].op.name} does"
                " not wait for them; let it read symmetric tensors through a layer that adds up their parts"
            )

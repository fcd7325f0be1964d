"""Planning: tile sizes of a kernel, and how a block's shared memory is divided."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from decoders import tiny_config
from panel_programs import serving_kernel, serving_program
from tri_mpk.errors import DeviceError
from tri_mpk.geometries import geometry
from tri_mpk.inspect import plan_config
from tri_mpk.ops.gemv import MAX_SLOTS, RING_OFFSET, SCRATCH_BYTES, STREAM_BYTES
from tri_mpk.ops.op import TENSOR_MAP_WORDS, TENSOR_MAPS
from tri_mpk.ops.panels import OTHER_BYTES, PANEL_STATE_BYTES, RINGS_BYTES
from tri_mpk.program import Program, SharedMemoryPlan, kernel_constants
from tri_mpk.scheduler.device import SHARED_BYTES

HOPPER = 227 << 10  # of a block
COMPILER_BYTES = 22_528


def planned(name: str, num_layers: int = 2) -> Program:
    config = geometry(name)
    config.num_hidden_layers = num_layers
    return plan_config(config, torch.bfloat16, 256, num_workers=132)


@pytest.fixture(scope="module", params=["Llama-3.2-1B", "Qwen3-8B"])
def program(request: pytest.FixtureRequest) -> Program:
    return planned(request.param)


def largest_slot(program: Program) -> int:
    streams = [task.stream for task in program.graph.tasks if task.stream]
    return max(2 * stream.slot_rows * stream.cols for stream in streams)


def most_streams(program: Program) -> int:
    tasks = program.graph.tasks
    return max(sum(tasks[t].stream is not None for t in queue) for queue in program.schedule.queues)


@pytest.mark.parametrize("compiler_bytes", [0, 1, COMPILER_BYTES, 60_001])
def test_a_ring_fits_and_holds_what_it_must(program, compiler_bytes):
    plan = SharedMemoryPlan.divide(program, compiler_bytes, HOPPER)
    assert plan.num_bytes <= HOPPER
    assert plan.base >= compiler_bytes + most_streams(program) * STREAM_BYTES.value
    assert plan.base % 128 == 0 and plan.slot_bytes % 128 == 0 and plan.slot_bytes >= largest_slot(program)
    assert plan.num_bytes == plan.base + RING_OFFSET.value + plan.ring_slots * plan.slot_bytes + SCRATCH_BYTES.value
    assert 3 <= plan.ring_slots <= MAX_SLOTS.value
    assert plan.ring_slots == MAX_SLOTS.value or plan.num_bytes + plan.slot_bytes > HOPPER, "one more would fit"


def test_the_table_of_streams_grows_with_the_layers():
    few, many = (planned("Llama-3.2-1B", num_layers) for num_layers in (1, 3))
    assert few.source == many.source  # so that the compiler's share is the same
    bases = [SharedMemoryPlan.divide(program, COMPILER_BYTES, HOPPER).base for program in (few, many)]
    assert most_streams(many) > most_streams(few) and bases[1] > bases[0]


def test_never_more_slots_than_there_are_barriers(program):
    plan = SharedMemoryPlan.divide(program, COMPILER_BYTES, 16 << 20)
    assert plan.ring_slots == MAX_SLOTS.value and plan.num_bytes < 16 << 20


def test_too_little_for_a_ring(program):
    slot = -(-largest_slot(program) // 128) * 128
    base = -(-(COMPILER_BYTES + most_streams(program) * STREAM_BYTES.value) // 128) * 128
    least = base + RING_OFFSET.value + 3 * slot + SCRATCH_BYTES.value
    assert SharedMemoryPlan.divide(program, COMPILER_BYTES, least).ring_slots == 3
    with pytest.raises(DeviceError, match=rf"{least - 1} bytes of shared memory hold 2 slots of {slot} bytes"):
        SharedMemoryPlan.divide(program, COMPILER_BYTES, least - 1)
    with pytest.raises(DeviceError, match="hold 0 slots"):
        SharedMemoryPlan.divide(program, COMPILER_BYTES, 1000)


def test_no_ring_needs_no_slots(program):
    plain = dataclasses.replace(program, constants=dataclasses.replace(program.constants, ring=False))
    plan = SharedMemoryPlan.divide(plain, COMPILER_BYTES + 1, HOPPER)
    assert (plan.ring_slots, plan.slot_bytes) == (0, 0)
    assert plan.base >= COMPILER_BYTES + 1 and plan.num_bytes == plan.base + SHARED_BYTES.value
    with pytest.raises(DeviceError, match=f"needs {plan.num_bytes} bytes of shared memory, but a block has 1000 here"):
        SharedMemoryPlan.divide(plain, COMPILER_BYTES + 1, 1000)


@pytest.mark.parametrize(
    ("dtype", "row_lengths", "has_bulk_copies", "ring"),
    [
        (torch.bfloat16, [64, 128], True, True),
        (torch.float16, [8], True, True),
        (torch.bfloat16, [64, 100], True, False),  # rows that start between multiples of 16 bytes
        (torch.float32, [64], True, False),
        (torch.bfloat16, [64], False, False),
    ],
)
def test_which_weights_come_through_a_ring(dtype, row_lengths, has_bulk_copies, ring):
    constants = kernel_constants(dtype, row_lengths, portable=False, has_bulk_copies=has_bulk_copies)
    assert constants.ring == ring and constants.weight_dtype == dtype and not constants.portable


def test_odd_rows_are_planned_without_a_ring():
    program = plan_config(tiny_config(intermediate_size=100), torch.bfloat16, 64, num_workers=4)
    assert not program.constants.ring and "RING = tl.constexpr(0)" in program.source
    program = plan_config(tiny_config(intermediate_size=104), torch.bfloat16, 64, num_workers=4)
    assert program.constants.ring and f"RING = tl.constexpr({program.constants.slot_bytes})" in program.source


# ---- panels ----

ROUNDING = 1024  # rings begin at a multiple of it


@pytest.fixture(scope="module")
def with_panels() -> Program:
    return serving_program()


def test_maps_are_in_the_order_of_the_tensor_that_holds_them(with_panels):
    tensor = with_panels.tensors[TENSOR_MAPS]
    assert tensor.dims == (TENSOR_MAP_WORDS * len(with_panels.maps),) and tensor.dtype is torch.int64
    assert len(set(with_panels.maps)) == len(with_panels.maps)
    tasks = [task for task in with_panels.graph.tasks if task.panels]
    assert tasks
    used = set()
    for task in tasks:
        panels, weights = task.panels, [task.fields.get(name) for name in ("weight_ptr", "gate_ptr", "up_ptr")]
        starts = [start for start in (panels.start, panels.second) if start]
        maps = [with_panels.maps[start.offset // TENSOR_MAP_WORDS] for start in starts]
        assert [m.tensor for m in maps] == [weight.tensor for weight in weights if weight]
        x = "h" if "h_map_addr" in task.fields else "xb"
        place = task.fields[f"{x}_map_addr"].offset // TENSOR_MAP_WORDS
        assert [m.tensor for m in with_panels.maps[place : place + 2]] == [task.fields[f"{x}_ptr"].tensor] * 2
        used |= {start.offset // TENSOR_MAP_WORDS for start in starts} | {place, place + 1}
    assert used == set(range(len(with_panels.maps))), "maps that nobody needs"


def test_maps_describe_the_tensors_as_they_are(with_panels):
    for tensor_map in with_panels.maps:
        tensor = with_panels.tensors[tensor_map.tensor]
        assert tensor_map.num_rows * tensor_map.num_columns == tensor.numel and tensor.dtype.itemsize == 2
        assert tensor_map.num_columns == tensor.dims[-1] and 0 < tensor_map.box_rows <= 256, "what a request can bring"


@pytest.mark.parametrize("compiler_bytes", [0, OTHER_BYTES.value + 1, 200 << 10, 230_400])
def test_rings_of_panels_overlay_what_is_the_compilers(with_panels, compiler_bytes):
    plan = SharedMemoryPlan.divide(with_panels, compiler_bytes, HOPPER)
    assert plan.base >= max(compiler_bytes, OTHER_BYTES.value + ROUNDING + RINGS_BYTES.value)
    assert plan.base % 128 == 0 and plan.ring_slots == plan.slot_bytes == 0
    assert plan.num_bytes == plan.base + SHARED_BYTES.value + PANEL_STATE_BYTES.value <= HOPPER
    assert plan.base < max(compiler_bytes, OTHER_BYTES.value + ROUNDING + RINGS_BYTES.value) + 128, "no more than that"


def test_too_little_for_panels(with_panels):
    least = SharedMemoryPlan.divide(with_panels, 0, HOPPER).num_bytes
    assert SharedMemoryPlan.divide(with_panels, 0, least).num_bytes == least
    with pytest.raises(DeviceError, match=f"needs {least} bytes of shared memory, but a block has {least - 1} here"):
        SharedMemoryPlan.divide(with_panels, 0, least - 1)


def test_without_wgmma_there_are_no_maps():
    kernel = serving_kernel()
    kernel.panels = False
    program = kernel.plan()
    assert program.maps == [] and TENSOR_MAPS not in program.tensors
    assert not any(task.panels for task in program.graph.tasks)
    plan = SharedMemoryPlan.divide(program, COMPILER_BYTES, HOPPER)
    assert plan.num_bytes == plan.base + SHARED_BYTES.value < OTHER_BYTES.value + RINGS_BYTES.value


def test_the_name_of_the_maps_is_the_kernels_own():
    kernel = serving_kernel()
    kernel.new_tensor((4,), torch.int64, TENSOR_MAPS)
    with pytest.raises(ValueError, match="'tensor_maps' is the kernel's own"):
        kernel.plan()


def test_short_rows_need_no_maps():
    program = serving_program(hidden_size=256)
    assert program.maps == [] and TENSOR_MAPS not in program.tensors


def test_layers_share_the_maps_of_activations():
    names = [tensor_map.tensor for tensor_map in serving_program().maps]
    assert [names.count(name) for name in ("x.normed", "attention", "hidden")] == [2, 2, 2]
    assert [names.count(f"L0{layer}.qkv_proj") for layer in range(2)] == [1, 1]

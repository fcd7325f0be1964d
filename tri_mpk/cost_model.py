"""The time of a decode step, estimated from a GPU's profile and a planned program, without running either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tri_mpk.gpu_profile import GpuProfile
from tri_mpk.program import NUM_WARPS, Program, SharedMemoryPlan
from tri_mpk.scheduler.simulate import StepTime, Work, WorkerRates, step_time

COMPILER_SHARED_BYTES = 1024  # what Triton takes for itself, at most, in the kernels of real models with a ring


def kv_blocks(program: Program, context: int) -> dict[int, int]:
    """Attention task -> blocks of the KV cache it reads when the new token is number `context` of its sequence."""
    if context < 1:
        raise ValueError(f"context={context} must be at least 1, the new token itself")
    blocks = {}
    for index, constants in _tasks_of(program, "attention"):
        _, split = program.graph.tasks[index].tile
        num_splits, num_blocks = active_splits(constants, context), -(-(context - 1) // constants["BLOCK_KV"])
        span = (split + 1) * num_blocks // num_splits - split * num_blocks // num_splits
        blocks[index] = span if split < num_splits else 0
    return blocks


def active_splits(constants: dict[str, int], context: int) -> int:
    """As tri_mpk.ops.attention.active_splits says in the kernel."""
    return min(max(-(-(context - 1) // constants["SPLIT_TOKENS"]), 1), constants["NUM_SPLITS"])


def _tasks_of(program: Program, op: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The tasks of an op, with their compile-time constants."""
    constants = {i: dict(v.constants) for i, v in enumerate(program.variants) if v.op.name == op}
    for index, task in enumerate(program.graph.tasks):
        if task.variant in constants:
            yield index, constants[task.variant]


def work_of(program: Program, gpu: GpuProfile, context: int) -> Work:
    """What each task of a program has to do at a context."""
    work = Work.none(len(program.graph.tasks))
    itemsize = program.constants.weight_dtype.itemsize
    for index, task in enumerate(program.graph.tasks):
        if task.stream is not None:
            matrices = 1 if task.stream.second is None else 2
            work.stream_bytes[index] = task.cost_bytes
            work.stream_slots[index] = matrices * -(-task.stream.rows // max(task.stream.slot_rows, 1))
    blocks = kv_blocks(program, context)
    for index, constants in _tasks_of(program, "attention"):
        at_once = NUM_WARPS if constants["BY_WARPS"] else 1
        work.load_bytes[index] = 2 * blocks[index] * constants["BLOCK_KV"] * constants["DH"] * itemsize
        work.latency_s[index] = -(-blocks[index] // at_once) * gpu.round_s
    for index, constants in _tasks_of(program, "attention_output"):
        # parts come from L2, about as fast as weights can be multiplied
        part_bytes = active_splits(constants, context) * constants["K"] * itemsize
        work.latency_s[index] = part_bytes * gpu.num_sms / gpu.multiply_bytes_per_s
    return work


def worker_rates(program: Program, gpu: GpuProfile) -> WorkerRates:
    """One of the program's workers on a GPU. Raises DeviceError when there is no room for its weight ring."""
    plan = SharedMemoryPlan.divide(program, COMPILER_SHARED_BYTES, gpu.shared_bytes)
    return WorkerRates(
        stream_bytes_per_s=gpu.bandwidth_bytes_per_s / program.num_workers,
        multiply_bytes_per_s=gpu.multiply_bytes_per_s / gpu.num_sms,
        ring_bytes=max(plan.ring_slots - 1, 0) * plan.slot_bytes,  # one slot is being read
        slot_bytes=plan.slot_bytes,
        slot_s=gpu.slot_s if program.constants.ring else 0.0,
        hop_s=gpu.hop_s,
        queue_s=gpu.queue_s,
        task_s=gpu.task_s,
        ticket_s=gpu.hop_s,  # a journey to memory and back; not measured by itself
    )


def estimate(program: Program, gpu: GpuProfile, context: int) -> StepTime:
    """Seconds per token when the new one is number `context` of its sequence. Kernels with pools: never measured."""
    return step_time(program.events, program.schedule, work_of(program, gpu, context), worker_rates(program, gpu))

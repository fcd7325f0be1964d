"""The time of a decode step, estimated from a GPU's profile and a planned program, without running either."""

from __future__ import annotations

from tri_mpk.gpu_profile import GpuProfile
from tri_mpk.program import Program, SharedMemoryPlan
from tri_mpk.scheduler.simulate import StepTime, Work, WorkerRates, step_time

COMPILER_SHARED_BYTES = 22_528  # what Triton takes for itself in the kernels of real models; a guess before compiling
BLOCKS_PER_ROUND = 2  # blocks of keys and values that attention has under way at once


def kv_blocks(program: Program, context: int) -> dict[int, int]:
    """Attention task -> blocks of the KV cache it reads when the new token is number `context` of its sequence."""
    if context < 1:
        raise ValueError(f"context={context} must be at least 1, the new token itself")
    blocks = {}
    for index, task in enumerate(program.graph.tasks):
        variant = program.variants[task.variant]
        if variant.op.name == "attention":
            constants = dict(variant.constants)
            num_splits, num_blocks = constants["NUM_SPLITS"], -(-(context - 1) // constants["BLOCK_KV"])
            _, split = task.tile
            blocks[index] = (split + 1) * num_blocks // num_splits - split * num_blocks // num_splits
    return blocks


def work_of(program: Program, gpu: GpuProfile, context: int) -> Work:
    """What each task of a program has to do at a context."""
    work = Work.none(len(program.graph.tasks))
    itemsize = program.constants.weight_dtype.itemsize
    for index, task in enumerate(program.graph.tasks):
        if task.stream is not None:
            matrices = 1 if task.stream.second is None else 2
            work.stream_bytes[index] = task.cost_bytes
            work.stream_slots[index] = matrices * -(-task.stream.rows // max(task.stream.slot_rows, 1))
    for index, num_blocks in kv_blocks(program, context).items():
        constants = dict(program.variants[program.graph.tasks[index].variant].constants)
        work.load_bytes[index] = 2 * num_blocks * constants["BLOCK_KV"] * constants["DH"] * itemsize
        work.latency_s[index] = -(-num_blocks // BLOCKS_PER_ROUND) * gpu.round_s
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
    )


def estimate(program: Program, gpu: GpuProfile, context: int) -> StepTime:
    """Seconds per token when the new one is number `context` of its sequence."""
    return step_time(program.events, program.schedule, work_of(program, gpu, context), worker_rates(program, gpu))

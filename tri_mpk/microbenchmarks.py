"""A GPU's profile, measured: how fast weights come, and what a hop costs. A few seconds, most of them compiling.

All waits are bounded as those of a decode kernel are, so that a measurement ends whatever happens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl

from tri_mpk.errors import DeviceError
from tri_mpk.gpu_profile import GpuProfile, bundled, device_properties, estimated, with_sms
from tri_mpk.scheduler import device as words
from tri_mpk.scheduler.device import wait_counter

BLOCK = 16384  # int32 values that a program reads at a time: 64 KiB
NUM_WARPS = 16
NUM_HOPS = 1000
SAMPLES = 7
WARMUP = 20  # launches until the clocks are up
WAIT_BOUND_NS = 2_000_000_000
MAX_BYTES, MIN_BYTES = 4 << 30, 256 << 20  # of the memory to read: many times what L2 holds


@triton.jit
def stream_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Each program reads one block."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x = tl.load(x_ptr + start + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(x))


@triton.jit
def hop_kernel(x_ptr, out_ptr, event_ptr, control_ptr, num_hops, num_blocks, LOADS: tl.constexpr, BLOCK: tl.constexpr):
    """Every program signals one event and waits until all have, again and again.

    With LOADS each has a block of its own on its way meanwhile.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.int32)
    for hop in tl.range(0, num_hops, num_stages=1):
        if LOADS:
            block = (hop * num_programs + program) % num_blocks
            x = tl.load(x_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        tl.debug_barrier()
        tl.atomic_add(event_ptr, 1, sem="release", scope="gpu")
        # the signals of all programs for this hop
        wait_counter(event_ptr, (hop + 1) * num_programs, hop, control_ptr, False)
        if LOADS:
            total += x
    if LOADS:
        tl.store(out_ptr + program, tl.sum(total))


def measure_profile(device: torch.device) -> GpuProfile:
    """This GPU's profile. What no small kernel shows (the time of a task, of a round of attention, of multiplying) is
    taken from the bundled profile of this GPU, or estimated from its clock.

    Raises: DeviceError when other programs hold some of the SMs or most of the memory, or a wait exceeds its bound.
    """
    name, properties = torch.cuda.get_device_name(device), device_properties(device)
    known = bundled(name)
    base = estimated(name, properties) if known is None else with_sms(known, properties["multiprocessor_count"])
    with torch.cuda.device(device):
        x = memory_to_read(device)
        hop_s = measure_hop(x, base.num_sms, loads=False)
        return replace(
            base,
            bandwidth_bytes_per_s=measure_bandwidth(x),
            hop_s=hop_s,
            queue_s=max(measure_hop(x, base.num_sms, loads=True) - hop_s, hop_s / 10),
        )


def memory_to_read(device: torch.device) -> torch.Tensor:
    """Random int32 values: constant ones take less power, and memory may compress them."""
    free, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(MAX_BYTES, free // 2)
    if num_bytes < MIN_BYTES:
        raise DeviceError(
            f"{free >> 20} MiB of {device} are free, but measuring needs {2 * MIN_BYTES >> 20}; end other programs"
        )
    return torch.empty(num_bytes // (4 * BLOCK) * BLOCK, dtype=torch.int32, device=device).random_()


def measure_bandwidth(x: torch.Tensor) -> float:
    """Bytes per second of reading `x` once; the best of a few times."""
    num_blocks = x.numel() // BLOCK
    out = torch.empty(num_blocks, dtype=torch.int32, device=x.device)
    times = seconds(lambda: stream_kernel[(num_blocks,)](x, out, BLOCK, num_warps=NUM_WARPS))
    return 4 * x.numel() / min(times)


def measure_hop(x: torch.Tensor, num_programs: int, loads: bool) -> float:
    """Seconds per hop of all programs to all, median. With `loads`, weights are on their way meanwhile."""
    event = torch.zeros(1, dtype=torch.int32, device=x.device)
    control = torch.zeros(64, dtype=torch.int64, device=x.device)
    out = torch.empty(num_programs, dtype=torch.int32, device=x.device)
    control[words.CONTROL_WAIT_BOUND.value] = WAIT_BOUND_NS

    def launch() -> None:
        event.zero_()
        hop_kernel[(num_programs,)](
            x, out, event, control, NUM_HOPS, x.numel() // BLOCK, loads, BLOCK,
            num_warps=NUM_WARPS, launch_cooperative_grid=True,
        )  # fmt: skip

    try:
        times = seconds(launch)
    except RuntimeError as error:
        raise DeviceError(f"{num_programs} programs do not run at once on {x.device}: {error}") from error
    if control[words.CONTROL_ABORT.value]:
        raise DeviceError(f"a hop on {x.device} took longer than {WAIT_BOUND_NS / 1e9:.0f} s; is the GPU shared?")
    return statistics.median(times) / NUM_HOPS


def seconds(launch: Callable[[], None]) -> list[float]:
    """GPU time of each of a few launches."""
    for _ in range(WARMUP):
        launch()
    times = []
    for _ in range(SAMPLES):
        began, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        launch()
        done.record()
        done.synchronize()
        times.append(began.elapsed_time(done) * 1e-3)
    return times

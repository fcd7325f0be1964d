"""What the cost model knows about a GPU: a few numbers.

They were measured, and come from a file of this package or from one that `tri-mpk tune` stored. For a GPU that nobody
measured they are estimates from what its driver says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime import driver

from tri_mpk.store import cache_dir, read_json, slug, write_json

BUNDLED = Path(__file__).with_name("gpus")
STREAMED_OF_PEAK = 0.9  # of a memory's nominal rate that reading weights reaches
CAUTIOUS_SM_BYTES_PER_S = 8e9  # per SM, where the driver does not tell the memory's rate


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """A GPU in numbers. Rates are of the whole GPU, times are seen from inside a persistent kernel."""

    name: str  # as the driver gives it
    num_sms: int
    sm_clock_hz: float
    bandwidth_bytes_per_s: float  # weights from memory into shared memory
    multiply_bytes_per_s: float  # weights in shared memory, multiplied
    slot_s: float  # of a slot of the weight ring, beyond its bytes
    hop_s: float  # from an event's last signal to the first instruction behind a wait for it, in quiet memory
    queue_s: float  # a hop also waits behind the weights under way, at most for so long
    task_s: float  # of a task without weights, without its wait
    round_s: float  # attention: loading blocks of keys and values and using them, beyond what their bytes take
    shared_bytes: int  # shared memory of one block

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r} must be the GPU's name")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{field.name}={value!r} of {self.name} must be a positive number")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> GpuProfile:
        """From a file's JSON. Raises ValueError when a field is missing, unknown or out of range."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a GPU profile has the fields {', '.join(sorted(names))}, got {found}")
        return cls(**values)

    @property
    def sm_bytes_per_s(self) -> float:
        """One SM's share of the bandwidth."""
        return self.bandwidth_bytes_per_s / self.num_sms


def bundled(name: str) -> GpuProfile | None:
    """The profile that comes with the package, if this GPU has one."""
    path = BUNDLED / f"{slug(name)}.json"
    return read_json(path, GpuProfile.parse, "Install tri_mpk again") if path.exists() else None


# What is planned for where there is no GPU, and what estimates for unknown GPUs start from.
DEFAULT_GPU_NAME = "NVIDIA H200"


def default_profile() -> GpuProfile:
    return bundled(DEFAULT_GPU_NAME)


def stored_path(name: str) -> Path:
    return cache_dir() / "gpus" / f"{slug(name)}.json"


def stored(name: str) -> GpuProfile | None:
    """The profile that was measured on this machine. A file that cannot be used is ignored with a warning."""

    def parse(values: dict[str, Any]) -> GpuProfile:
        profile = GpuProfile.parse(values)
        if profile.name != name:
            raise ValueError(f"it is of {profile.name}, not of {name}")
        return profile

    return read_json(stored_path(name), parse, "Run `tri-mpk tune --measure` to measure this GPU again")


def store(profile: GpuProfile) -> Path:
    path = stored_path(profile.name)
    write_json(path, asdict(profile))
    return path


def estimated(name: str, properties: dict[str, int]) -> GpuProfile:
    """A profile of a GPU that was never measured.

    Args:
        properties: as Triton's driver gives them: multiprocessor_count, sm_clock_rate and mem_clock_rate in kHz,
            mem_bus_width in bits, max_shared_mem in bytes. Rates that the driver does not know are 0.

    Times scale with the clock of the SMs from those of the GPU that was measured best; bandwidth is 90 % of what clock
    and bus of the memory give, or, where they are not known, little enough for any GPU of recent years.
    """
    known = default_profile()
    num_sms = properties["multiprocessor_count"]
    clock = properties.get("sm_clock_rate", 0) * 1e3 or known.sm_clock_hz
    peak = 2 * properties.get("mem_clock_rate", 0) * 1e3 * properties.get("mem_bus_width", 0) / 8
    slower = known.sm_clock_hz / clock
    return GpuProfile(
        name=name,
        num_sms=num_sms,
        sm_clock_hz=clock,
        bandwidth_bytes_per_s=STREAMED_OF_PEAK * peak or CAUTIOUS_SM_BYTES_PER_S * num_sms,
        multiply_bytes_per_s=known.multiply_bytes_per_s / known.num_sms * num_sms / slower,
        slot_s=known.slot_s * slower,
        hop_s=known.hop_s * slower,
        queue_s=known.queue_s * slower,
        task_s=known.task_s * slower,
        round_s=known.round_s * slower,
        shared_bytes=properties["max_shared_mem"],
    )


def find_profile(device: torch.device) -> tuple[GpuProfile, str]:
    """The profile to plan with for `device`, and where it comes from: measured here, bundled, or estimated.

    Where there is no GPU, plans are for DEFAULT_GPU_NAME. A GPU with fewer SMs than its profile says (a MIG slice)
    has that part of the bandwidth.
    """
    if device.type != "cuda":
        return default_profile(), "bundled"
    name = torch.cuda.get_device_name(device)
    properties = device_properties(device)
    for source, profile in (("measured", stored(name)), ("bundled", bundled(name))):
        if profile is not None:
            return with_sms(profile, properties["multiprocessor_count"]), source
    return estimated(name, properties), "estimated"


def with_sms(profile: GpuProfile, num_sms: int) -> GpuProfile:
    """The same GPU with another number of SMs, each with what it had before."""
    part = num_sms / profile.num_sms
    return replace(
        profile,
        num_sms=num_sms,
        bandwidth_bytes_per_s=profile.bandwidth_bytes_per_s * part,
        multiply_bytes_per_s=profile.multiply_bytes_per_s * part,
    )


def device_properties(device: torch.device) -> dict[str, int]:
    """What Triton's driver knows about a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)

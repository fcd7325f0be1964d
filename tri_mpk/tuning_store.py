"""Tunings that `tri-mpk tune` measured, kept in the cache folder: one file per GPU, model shape and type of weights.

A file also says for which version of the kernel it was measured: after a change of what runs on the GPU it is stale,
and the cost model's choice is used until somebody tunes again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tri_mpk import ops, scheduler
from tri_mpk.gpu_profile import GpuProfile
from tri_mpk.models import DecoderShape
from tri_mpk.store import cache_dir, read_json, slug, write_json
from tri_mpk.tuning import Tuning, choose_tuning

# What a kernel is made of and by: ops/ and, of the other folders, these.
KERNEL_MODULES = {
    "scheduler": ("descriptor.py", "device.py", "events.py", "queues.py"),
    "tri_mpk": ("generator.py", "program.py", "runtime.py"),
}


@dataclass(frozen=True, slots=True)
class StoredTuning:
    """What was measured to be fastest, with what it is compared to."""

    gpu: str
    num_sms: int
    shape: str
    dtype: str
    kernel: str  # version of the kernel, see kernel_version
    tuning: Tuning
    ms: dict[str, float]  # per token, by context
    chosen_ms: dict[str, float]  # of the cost model's choice, in the same run
    date: str  # UTC, ISO 8601

    @classmethod
    def parse(cls, values: dict[str, Any]) -> StoredTuning:
        """Raises ValueError or TypeError for anything but what `asdict` gives."""
        stored = cls(**values | {"tuning": Tuning.parse(values["tuning"])})
        for times in (stored.ms, stored.chosen_ms):
            if not times or not all(isinstance(ms, float) and ms > 0 for ms in times.values()):
                raise ValueError(f"times must be positive ms by context, got {times}")
        return stored


def shape_name(shape: DecoderShape) -> str:
    """What decides which matrices and caches a step reads: `L16-D2048-I8192-H32-KV8x64-V128256`."""
    return (
        f"L{shape.num_layers}-D{shape.hidden_size}-I{shape.intermediate_size}-H{shape.num_q_heads}"
        f"-KV{shape.num_kv_heads}x{shape.head_dim}-V{shape.vocab_size}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def kernel_version() -> str:
    """Changes whenever a file does that decides what runs on the GPU."""
    folders = {"scheduler": Path(scheduler.__file__).parent, "tri_mpk": Path(__file__).parent}
    files = sorted(Path(ops.__path__[0]).glob("*.py"))
    files += [folders[folder] / name for folder, names in KERNEL_MODULES.items() for name in names]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def tuning_path(gpu: GpuProfile, shape: DecoderShape, dtype: torch.dtype) -> Path:
    return cache_dir() / "tuning" / f"{slug(gpu.name)}_{shape_name(shape)}_{dtype_name(dtype)}.json"


def load_tuning(gpu: GpuProfile, shape: DecoderShape, dtype: torch.dtype) -> StoredTuning | None:
    """What was measured for this GPU, shape and type with the present kernel.

    A file that is damaged, stale or of another number of SMs is ignored with a warning.
    """

    def parse(values: dict[str, Any]) -> StoredTuning:
        stored = StoredTuning.parse(values)
        wanted = {"gpu": gpu.name, "num_sms": gpu.num_sms, "shape": shape_name(shape), "dtype": dtype_name(dtype)}
        for name, value in wanted.items():
            if getattr(stored, name) != value:
                raise ValueError(f"it is for {name}={getattr(stored, name)}, not {value}")
        if stored.kernel != kernel_version():
            raise ValueError(f"it was measured on {stored.date} with another version of the kernel")
        return stored

    return read_json(tuning_path(gpu, shape, dtype), parse, "Run `tri-mpk tune` to measure again")


def store_tuning(path: Path, stored: StoredTuning) -> None:
    write_json(path, asdict(stored))


def read_tuning(path: str | Path) -> Tuning:
    """From a file that `tri-mpk tune` stored, or one of the knobs alone. Raises ValueError if it is damaged."""
    try:
        values = json.loads(Path(path).read_text())
        return Tuning.parse(values.get("tuning", values) if isinstance(values, dict) else values)
    except ValueError as error:
        raise ValueError(f"{path} holds no tuning: {error}") from error


def find_tuning(
    gpu: GpuProfile, shape: DecoderShape, dtype: torch.dtype, num_workers: int | None = None
) -> tuple[Tuning, str]:
    """The tuning to use, and where it comes from: a measurement, else the cost model.

    `num_workers`: None: whatever is best; a measurement with another number is left aside.
    """
    stored = load_tuning(gpu, shape, dtype)
    if stored is not None and num_workers in (None, stored.tuning.num_workers):
        return stored.tuning, f"measured {stored.date}"
    return choose_tuning(gpu, shape.num_kv_heads, shape.head_dim, num_workers), "cost model"

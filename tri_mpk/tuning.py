"""The knobs of a kernel, and the cost model's choice of them. No op and no model types in one of these numbers.

The choice needs a GPU's profile and the shape of attention only. `tri-mpk tune` refines it by measuring
(tri_mpk/tuner.py); what it finds is kept by tri_mpk/tuning_store.py.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from tri_mpk.gpu_profile import GpuProfile
from tri_mpk.ops.op import next_power_of_2

MIN_SLOT_BYTES, MAX_SLOT_BYTES = 4 << 10, 64 << 10
MAX_PREFETCH_BYTES = 1 << 20
PREFETCH_BYTES = 512 << 10  # more than memory brings a worker while attention over short contexts is awaited
MIN_RING_SLOTS = 6  # of which one is read and one waits to be refilled
MIN_BLOCK_KV = 16  # the least that tl.dot takes
MAX_BLOCK_KV = 32
MAX_BLOCK_ELEMENTS = 2048  # of one block of keys: more does not fit the registers of a warp
SPLIT_BYTES = 32 << 10  # of keys and values of 16 bits: worth another worker, and one more part to merge, from here on
BUSY_WORKERS = 0.95  # attention gives so many of them something to do, at least


@dataclass(frozen=True, slots=True)
class Tuning:
    """All that may differ between two kernels of the same model on the same GPU.

    Raises: ValueError for values that no kernel can be made of.
    """

    num_workers: int  # persistent programs
    slot_bytes: int  # of the weight ring: as many whole rows are requested at once, or one if that is more
    block_kv: int  # tokens of the KV cache that attention loads at once
    num_splits: int  # parts of the KV length per KV head, at most
    split_tokens: int  # of a part at least, while there are fewer parts than that
    prefetch_bytes: int = 0  # of weights at most that each worker has L2 fetch while it waits for attention

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:
                raise ValueError(f"{field.name}={value!r} must be an integer")
        for name in ("num_workers", "num_splits", "split_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, least, most in (
            ("slot_bytes", MIN_SLOT_BYTES, MAX_SLOT_BYTES),
            ("block_kv", MIN_BLOCK_KV, MAX_BLOCK_KV),
        ):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from {least} to {most}")
        if not 0 <= self.prefetch_bytes <= MAX_PREFETCH_BYTES or self.prefetch_bytes % 16:
            raise ValueError(
                f"prefetch_bytes={self.prefetch_bytes} must be a multiple of 16 from 0 to {MAX_PREFETCH_BYTES}"
            )
        if self.split_tokens < self.block_kv:  # a split without a block would be a part of nothing
            raise ValueError(f"split_tokens={self.split_tokens} must be at least block_kv={self.block_kv}")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Tuning:
        """From JSON. Raises ValueError when a knob is missing, unknown or out of range."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            found = ", ".join(sorted(map(str, values))) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"a tuning has the knobs {', '.join(sorted(names))}; got {found or 'none'}")
        return cls(**values)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def choose_tuning(gpu: GpuProfile, num_kv_heads: int, head_dim: int, num_workers: int | None = None) -> Tuning:
    """The cost model's choice for a model with such KV heads. `num_workers`: None: one per SM."""
    num_workers = gpu.num_sms if num_workers is None else num_workers
    return Tuning(
        num_workers=num_workers,
        slot_bytes=choose_slot_bytes(gpu),
        block_kv=largest_block_kv(head_dim),
        num_splits=choose_num_splits(num_workers, num_kv_heads),
        split_tokens=max(1, SPLIT_BYTES // (4 * head_dim)),
        prefetch_bytes=PREFETCH_BYTES,
    )


def choose_slot_bytes(gpu: GpuProfile) -> int:
    """What an SM streams during a hop, as the nearest power of two, if the ring then still has enough slots.

    Each slot costs a request and a wait, so small ones cost more than they carry. Two slots of a ring are never on
    their way, so large ones leave less to stream while workers wait for each other.
    """
    most = min(MAX_SLOT_BYTES, 1 << int(math.log2(gpu.shared_bytes / MIN_RING_SLOTS)))
    streamed = min(max(gpu.hop_s * gpu.sm_bytes_per_s, MIN_SLOT_BYTES), most)
    return 1 << round(math.log2(streamed))


def largest_block_kv(head_dim: int) -> int:
    """Keys and values of a block fill half of a warp's registers."""
    return max(MIN_BLOCK_KV, min(MAX_BLOCK_KV, MAX_BLOCK_ELEMENTS // next_power_of_2(head_dim)))


def choose_num_splits(num_workers: int, num_kv_heads: int) -> int:
    """Splits per KV head so that nearly all workers have one, in one round where that is possible."""
    num_splits = max(1, num_workers // num_kv_heads)
    while num_kv_heads * num_splits < BUSY_WORKERS * num_workers:
        num_splits += 1
    return num_splits

"""Several ranks, seen from their hosts: who they are, whether they fit together, and what they tell each other.

Nothing but torch.distributed is used: its store for a few facts before and after a launch, gloo for tensors, symmetric
memory for what kernels share. During a launch the hosts are silent.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import triton

from tri_mpk.errors import DeviceError, RankError

MEET_BOUND_S = 300.0  # ranks come to a meeting with so much delay at most: one may still be compiling
_meetings = itertools.count()  # every connection has keys of its own in the store; all ranks make them in one order


class Ranks:
    """The connection between the ranks of one model. All calls but `say` and `hear` are collective."""

    def __init__(self, rank: int, world_size: int, store: dist.Store, group: dist.ProcessGroup):
        self.rank, self.world_size = rank, world_size
        self.store = dist.PrefixStore(f"tri_mpk/{next(_meetings)}", store)
        self.group = group
        self.num_meetings = 0
        self.said: list[str] = []  # keys that are still there

    def meet(self, what: str, value: Any = None, bound_s: float | None = None) -> list[Any]:
        """Every rank's value. Raises RankError, which names those who do not come in time."""
        keys = [f"{self.num_meetings}/{rank}" for rank in range(self.world_size)]
        self.num_meetings += 1
        bound_s = MEET_BOUND_S if bound_s is None else bound_s
        try:
            self.store.set(keys[self.rank], pickle.dumps(value))
            if missing := self._missing(keys, bound_s):
                raise RankError(missing, f"did not come to {what} within {bound_s:g} s")
            values = [pickle.loads(self.store.get(key)) for key in keys]
            if self.num_meetings > 1:  # whoever is here has read what was said before
                self.store.delete_key(f"{self.num_meetings - 2}/{self.rank}")
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, RankError):
                raise
            raise RankError([], f"cannot be asked about {what}: the store is gone ({error})") from error
        return values

    def _missing(self, keys: Sequence[str], bound_s: float) -> list[int]:
        """The ranks whose keys are not in the store within the bound."""
        started = time.monotonic()
        missing = list(range(len(keys)))
        while missing and not self.store.check([keys[rank] for rank in missing]):
            missing = [rank for rank in missing if not self.store.check([keys[rank]])]
            waited = time.monotonic() - started
            if missing and waited > bound_s:
                return missing
            if waited > 0.05:  # ranks that come at about the same time go on at about the same time
                time.sleep(min(waited / 100, 0.01))
        return []

    def agree(self, what: str, facts: dict[str, Any], error: type[Exception] = ValueError) -> None:
        """Raises `error` on all ranks if a fact is not the same on all of them."""
        everybody = self.meet(what, facts)
        for name, value in everybody[0].items():
            for rank, other in enumerate(everybody):
                if other.get(name) != value:
                    raise error(
                        f"{what}: {name} differs between ranks, {value!r} on rank 0 and {other.get(name)!r} on rank"
                        f" {rank}; all ranks must run the same script on equal machines"
                    )

    def say(self, what: str, text: str = "") -> None:
        """Leaves a word that `hear` looks for. Nobody needs to be there."""
        with suppress(dist.DistError, RuntimeError):  # the store may be gone
            self.said.append(f"{what}/{self.rank}")
            self.store.set(self.said[-1], text or " ")
            if len(self.said) > 2:
                self.store.delete_key(self.said.pop(0))

    def hear(self, what: str, bound_s: float) -> tuple[list[int], dict[int, str]]:
        """The ranks that have said nothing about it within the bound, and what the others have said, if anything."""
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        try:
            silent = self._missing(keys, bound_s)
            texts = {rank: self.store.get(keys[rank]).decode() for rank in range(len(keys)) if rank not in silent}
        except (dist.DistError, RuntimeError):
            return [0] if self.rank else [], {}  # the store is gone; rank 0 kept it unless torchrun does
        return silent, {rank: text for rank, text in texts.items() if text.strip()}

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors side by side: [..., n] of each rank, whose last dimensions may differ."""
        mine = tensor.movedim(-1, 0).contiguous().cpu()
        sizes = self.meet("a gathering", len(mine))
        most = max(sizes)
        padded = mine.new_zeros((most, *mine.shape[1:]))
        padded[: len(mine)] = mine
        everybody = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everybody, padded, group=self.group)
        whole = torch.cat([part[:size] for part, size in zip(everybody, sizes, strict=True)])
        return whole.movedim(0, -1).contiguous().to(tensor.device)


def world() -> tuple[int, int]:
    """(rank, world_size) of torch.distributed, of torchrun if that is not initialised, or (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def resolve_world(tensor_parallel: int | str) -> tuple[int, int]:
    """(rank, world_size) that `tensor_parallel` asks for. Raises ValueError where there is another number of ranks."""
    rank, world_size = world()
    if tensor_parallel == "auto":
        return rank, world_size
    if isinstance(tensor_parallel, str) and tensor_parallel.isdecimal():
        tensor_parallel = int(tensor_parallel)
    if type(tensor_parallel) is not int or tensor_parallel < 1:
        raise ValueError(f"tensor_parallel={tensor_parallel!r} must be 'auto' or a number of ranks")
    if tensor_parallel == 1:
        return 0, 1
    if tensor_parallel != world_size:
        raise ValueError(
            f"tensor_parallel={tensor_parallel}, but there are {world_size} ranks; start the script with"
            f" `torchrun --nproc-per-node {tensor_parallel}`, or leave tensor_parallel out"
        )
    return rank, world_size


def rank_device() -> torch.device:
    """The GPU of this rank: torchrun's LOCAL_RANK, unless the script has chosen one already."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    current, local = torch.cuda.current_device(), int(os.environ.get("LOCAL_RANK", 0))
    if current == 0 and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device("cuda", current)


def connect(world_size: int, rank: int, device: torch.device) -> Ranks:
    """Joins the other ranks, and checks that their machines fit together. Raises DeviceError if they do not."""
    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise DeviceError(
                f"{world_size} ranks need torch.distributed; start the script with `torchrun --nproc-per-node"
                f" {world_size}`, or call torch.distributed.init_process_group first"
            )
        dist.init_process_group("gloo", timeout=timedelta(seconds=MEET_BOUND_S))
        atexit.register(_disconnect)
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise ValueError(
            f"rank {rank} of {world_size} was asked for, but torch.distributed says rank {dist.get_rank()} of"
            f" {dist.get_world_size()}"
        )
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=MEET_BOUND_S))
    except (dist.DistError, RuntimeError) as error:
        raise RankError([], f"did not come to connect within {MEET_BOUND_S:g} s ({error})") from error
    ranks = Ranks(rank, world_size, dist.distributed_c10d._get_default_store(), group)
    check_machines(ranks, device)
    return ranks


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check_machines(ranks: Ranks, device: torch.device) -> None:
    """One host, equal GPUs and versions, a GPU per rank, and access from each to every other."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "device type": device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    mine = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"GPU": properties.name, "SMs": properties.multi_processor_count}
        mine = (str(getattr(properties, "uuid", device.index)), os.environ.get("CUDA_VISIBLE_DEVICES"), device.index)
    ranks.agree("the machines of the ranks", facts, DeviceError)
    places = ranks.meet("the choice of GPUs", mine)
    if device.type != "cuda":
        return
    problem = None
    for other, (uuid, visible, index) in enumerate(places):
        if other == ranks.rank:
            continue
        if uuid == places[ranks.rank][0]:
            problem = f"ranks {ranks.rank} and {other} have the same GPU; give each one of its own (device=...)"
        elif visible == places[ranks.rank][1] and not torch.cuda.can_device_access_peer(device.index, index):
            problem = f"{device} cannot access cuda:{index} of rank {other}: there is no NVLink or PCIe peer access"
    problems = [found for found in ranks.meet("the check of GPUs", problem) if found]
    if problems:
        raise DeviceError(problems[0])


def symmetric_heap(num_bytes: int, device: torch.device, ranks: Ranks) -> tuple[torch.Tensor, list[int]]:
    """Zero-filled memory of this GPU that all ranks' GPUs can reach, and where each rank's lies, as seen from here."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        with torch.cuda.device(device):
            heap = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
            heap.zero_()
            torch.cuda.synchronize(device)
            handle = symmetric_memory.rendezvous(heap, dist.group.WORLD)
            addresses = list(handle.buffer_ptrs)
    except RuntimeError as error:
        raise DeviceError(
            f"rank {ranks.rank} cannot share memory between GPUs ({error}); tensor parallelism needs peer access"
            " between all GPUs of one host"
        ) from error
    heap.handle = handle  # lives as long as the memory does
    ranks.meet("the exchange of heaps")
    return heap, addresses

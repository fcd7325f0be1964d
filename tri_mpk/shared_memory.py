"""Tensors that the processes of a CPU run share: anonymous memory files, mapped by every worker.

Nothing is left behind whatever happens to the process, and no limit on /dev/shm applies.
"""

from __future__ import annotations

import os
import weakref

import torch


class SharedMemory:
    """Hands out tensors in shared memory and tells other processes where to find them."""

    def __init__(self) -> None:
        self._files: dict[int, tuple[int, int]] = {}  # address -> (file descriptor, bytes)
        self._finalizer = weakref.finalize(self, _close_all, self._files)

    def empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zero-filled tensor."""
        num_bytes = max(1, torch.Size(dims).numel()) * dtype.itemsize
        fd = os.memfd_create("tri_mpk")
        os.ftruncate(fd, num_bytes)
        flat = torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=num_bytes // dtype.itemsize, dtype=dtype)
        self._files[flat.data_ptr()] = (fd, num_bytes)
        return flat[: torch.Size(dims).numel()].view(dims)

    def move(self, tensor: torch.Tensor) -> None:
        """Moves a tensor's data into shared memory, in place: the caller's tensor stays valid."""
        if tensor.data_ptr() not in self._files:
            shared = self.empty(tuple(tensor.shape), tensor.dtype)
            shared.copy_(tensor)
            tensor.data = shared

    def free(self, tensor: torch.Tensor) -> None:
        """No process will open this tensor any more; its memory goes when the last mapping does."""
        fd, _ = self._files.pop(tensor.data_ptr())
        os.close(fd)

    def locate(self, tensor: torch.Tensor) -> tuple[str, int]:
        """Path and size in bytes of a tensor's file, for any process of this user while this one lives."""
        fd, num_bytes = self._files[tensor.data_ptr()]
        return f"/proc/{os.getpid()}/fd/{fd}", num_bytes


def _close_all(files: dict[int, tuple[int, int]]) -> None:
    for fd, _ in files.values():
        os.close(fd)
    files.clear()

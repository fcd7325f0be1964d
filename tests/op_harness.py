"""One or a few ops as a kernel of their own, run for one step by two worker processes in Triton's interpreter.

Outputs hold NaN before every step, the memory behind every tensor holds a pattern that must survive, and inputs must be
the same afterwards. All goes through PersistentKernel: `harness.mpk` adds the ops.
"""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import torch

import tri_mpk.runtime
from tri_mpk import PersistentKernel
from tri_mpk.ops.op import Op, TensorHandle
from tri_mpk.scheduler.graph import Region, Task
from tri_mpk.shared_memory import SharedMemory
from tri_mpk.tuning import Tuning

GUARD = 512  # elements behind every tensor
PATTERN = 0x5A


class GuardedMemory(SharedMemory):
    """Allocates GUARD elements more than asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[torch.Tensor] = []

    def empty(self, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(dims).numel()
        flat = super().empty((size + GUARD,), dtype)
        self.guards.append(flat[size:].view(torch.uint8))
        self.guards[-1].fill_(PATTERN)
        return flat[:size].view(dims)


class OpHarness:
    def __init__(self, num_workers: int = 2, max_seq_len: int = 8, tuning: Tuning | None = None):
        step, tokens = torch.zeros(1, dtype=torch.int32), torch.zeros(max_seq_len, dtype=torch.int64)
        self.mpk = PersistentKernel(
            num_workers=num_workers, meta_tensors=[step, tokens], wait_bound_s=30.0, tuning=tuning
        )
        self.changing = {"step", "tokens"}  # names of inputs that a step may change
        self._names = map("t{}".format, itertools.count())

    def input(self, *dims: int, scale: float = 1.0) -> TensorHandle:
        """Random normal numbers."""
        return self.attach(torch.randn(dims) * scale)

    def gain(self, size: int) -> TensorHandle:
        return self.attach(1 + 0.1 * torch.randn(size))

    def attach(self, tensor: torch.Tensor) -> TensorHandle:
        return self.mpk.attach_input(tensor, name=next(self._names))

    def output(self, *dims: int) -> TensorHandle:
        return self.mpk.new_tensor(dims, torch.float32, name=next(self._names))

    def keep_only(self, task: int) -> int:
        """Of the op that was added last only this task stays. Returns the op's index."""
        call = self.mpk.calls[-1]
        call.op = _with_one_task(call.op, task)
        return len(self.mpk.calls) - 1

    def tasks(self, op: int) -> list[Task]:
        return [task for task in self.mpk.plan().graph.tasks if task.op == op]

    def compile(self) -> None:
        """Adds an argmax of nothing, which ends the step, if there is none yet."""
        if self.mpk.runtime is not None:
            return
        if not any(call.op.name in ("argmax", "sample") for call in self.mpk.calls):
            best = self.attach(torch.zeros(1)), self.attach(torch.zeros(1, dtype=torch.int32))
            self.mpk.argmax_layer(input=best)
        self._outputs = [handle for handle in self.mpk.tensors.values() if handle.data is None]
        with mock.patch.object(tri_mpk.runtime, "SharedMemory", GuardedMemory):
            self.mpk.compile()

    def run(self, step: int = 0, token: int = 0) -> int:
        """One step at position `step`. Returns the token chosen."""
        self.compile()
        for handle in self._outputs:
            handle.data.fill_(float("nan") if handle.dtype.is_floating_point else -1)
        self.mpk.runtime.default_logits.fill_(float("nan"))
        self.mpk.step.data.fill_(step)
        self.mpk.tokens.data.zero_()
        self.mpk.tokens.data[step] = token
        before = {h.name: h.data.clone() for h in self.mpk.tensors.values() if h not in self._outputs}
        length = self.mpk(num_tokens=step + 1, max_new_tokens=1)
        assert length == step + 2 and int(self.mpk.step.data) == step + 1
        for name in before.keys() - self.changing:
            same = torch.equal(
                self.mpk.tensors[name].data.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8)
            )
            assert same, f"{name} is an input and has changed"
        for guard in self.mpk.runtime.memory.guards:
            assert bool((guard == PATTERN).all()), "memory behind a tensor was written to"
        return int(self.mpk.tokens.data[step + 1])


def _with_one_task(op: Op, index: int) -> Op:
    def cut(*args, **kwargs):
        result = op.cut(*args, **kwargs)
        result.tasks = [result.tasks[index]]
        return result

    return dataclasses.replace(op, cut=cut)


def region_mask(handle: TensorHandle, regions: tuple[Region, ...]) -> torch.Tensor:
    """Which elements [numel] of a tensor the regions name."""
    mask = torch.zeros(handle.numel, dtype=torch.bool)
    for region in regions:
        if region.tensor == handle.name:
            outer, (lo, hi) = region.box
            assert outer == (0, 1), region
            mask[lo:hi] = True
    return mask

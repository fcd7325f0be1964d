"""The PTX of releasing, run thread by thread: it leaves the counters and slots that the portable form leaves."""

from __future__ import annotations

import ast
import ctypes
import inspect
from types import ModuleType

import numpy as np
import pytest

from ptx_emulator import Block
from scheduler_helpers import chain
from tri_mpk.scheduler import by_value, derive_events, ready, schedule
from tri_mpk.scheduler.descriptor import SLOT_STRIDE, CounterLayout, pack
from tri_mpk.scheduler.device import TASK_SIGNALS


class Threads(Block):
    """Instructions on 32-bit counters in global memory, a thread at a time."""

    def __init__(self, inputs: list[np.ndarray]):
        super().__init__(inputs, 1)
        self.registers["%ntid.x"] = np.full(self.size, self.size, np.uint64)

    def _word(self, operand: str, thread: int) -> ctypes.c_int32:
        return ctypes.c_int32.from_address(int(self.addresses(operand)[thread]))

    def _one(self, name: str, thread: int, value: int) -> None:
        self.write(name, np.full(self.size, value & 0xFFFFFFFF, np.uint64), np.arange(self.size) == thread)

    def _ld(self, suffixes, operands, active):
        for thread in np.flatnonzero(active):
            self._one(operands[0], thread, self._word(operands[1], thread).value)

    def _st(self, suffixes, operands, active):
        for thread in np.flatnonzero(active):
            self._word(operands[0], thread).value = int(self.integers(operands[1])[thread])

    def _atom(self, suffixes, operands, active):
        for thread in np.flatnonzero(active):
            word = self._word(operands[1], thread)
            old = word.value
            word.value = old + int(self.integers(operands[2])[thread])
            self._one(operands[0], thread, old)

    def _red(self, suffixes, operands, active):
        for thread in np.flatnonzero(active):
            self._word(operands[0], thread).value += int(self.integers(operands[1])[thread])

    def _mov(self, suffixes, operands, active):
        if "," not in operands[0]:
            return super()._mov(suffixes, operands, active)
        low, high = (name.strip() for name in operands[0].split(","))
        pair = self.read(operands[1])
        self.write(low, pair & np.uint64(0xFFFFFFFF), active)
        self.write(high, pair >> np.uint64(32), active)

    def _and(self, suffixes, operands, active):
        a, b = (self.read(operand) & np.uint64(0xFFFFFFFF) for operand in operands[1:])
        self.write(operands[0], a & b, active)

    def _sub(self, suffixes, operands, active):
        a, b = (self.integers(operand) for operand in operands[1:])
        self.write(operands[0], (a - b) & 0xFFFFFFFF, active)

    def _add(self, suffixes, operands, active):
        mask = 0xFFFFFFFFFFFFFFFF if suffixes[-1] == "s64" else 0xFFFFFFFF
        sums = [(int(x) + int(y)) & mask for x, y in zip(*map(self.read, operands[1:]), strict=True)]
        self.write(operands[0], np.array(sums, np.uint64), active)

    def _mad(self, suffixes, operands, active):
        assert suffixes == ["wide", "s32"]
        a, b = (self.integers(operand) for operand in operands[1:3])
        sums = [(int(x) + int(y)) % 2**64 for x, y in zip(a * b, self.read(operands[3]), strict=True)]
        self.write(operands[0], np.array(sums, np.uint64), active)

    def _setp(self, suffixes, operands, active):
        read = self.read if suffixes[-1] == "u32" else self.integers
        a, b = (read(operand) for operand in operands[1:3])
        found = {"ne": a != b, "ge": a >= b, "gt": a > b, "lt": a < b}[suffixes[0]]
        if suffixes[1] == "and":
            found = found & (self.read(operands[3]) != 0)
        self.write(operands[0], found.astype(np.uint64), active)

    def _selp(self, suffixes, operands, active):
        a, b = (self.read(operand) for operand in operands[1:3])
        self.write(operands[0], np.where(self.read(operands[3]) != 0, a, b), active)

    def _cp(self, suffixes, operands, active):
        assert suffixes == ["async", "wait_all"]


def asm_of(module: ModuleType, name: str) -> str:
    """The assembly in a device function."""
    tree = ast.parse(inspect.getsource(module))
    (function,) = [node for node in tree.body if getattr(node, "name", None) == name]
    (text,) = [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "bar.sync" in node.value
    ]
    return text


@pytest.mark.parametrize("first_epoch", [1, 5, 2**31 - 2, -2])
def test_whoever_completes_an_event_releases_its_tasks(first_epoch: int):
    graph = chain(3)
    events = derive_events(graph)
    queues = schedule(graph, events, 2, dynamic=[1, 2])
    layout = CounterLayout(events, queues)
    words = pack(graph, events, queues, 16, [[]], {}).words
    descriptors = {int(word[0] >> 32): word for word in words if word[0] >> 32 >= 0}
    counters = layout.before(first_epoch)
    asm = asm_of(ready, "signal_and_release")
    (tasks,) = queues.pools
    for epoch in range(first_epoch, first_epoch + 3):
        released = []
        for task in range(len(graph.tasks)):
            if task in tasks:
                assert task in released, "a task runs that nobody released"
            inputs = [counters.ctypes.data, *descriptors[task][TASK_SIGNALS.value : TASK_SIGNALS.value + 2].tolist()]
            block = Threads([np.full(512, value % 2**64, np.uint64) for value in inputs])
            block.execute(asm)
            slots = counters[layout.slots(0) :: SLOT_STRIDE.value][: len(tasks)].astype(np.int64)
            numbers = (slots - epoch * len(tasks) + 2**31) % 2**32 - 2**31
            released = [tasks[number] for number in numbers if number >= 0]
            complete = [event for event in events.events[1:] if max(event.producers) <= task]
            assert sorted(released) == sorted(t for event in complete for t in event.consumers)
        assert sorted(released) == tasks
        counters[:1] += queues.num_leaving()  # what workers do when they leave the pool
        counters[layout.tickets(0) :][:1] += len(tasks) + queues.num_entries(0)
        expected = layout.before((epoch + 1 + 2**31) % 2**32 - 2**31)
        assert (counters[: layout.slots(0)] == expected[: layout.slots(0)]).all()


def test_one_thread_signals_by_a_value():
    counters = np.zeros(96, dtype=np.int32)
    Threads([np.full(512, counters[32:].ctypes.data, np.uint64)]).execute(asm_of(by_value, "signal_by_value"))
    assert counters[32] == 1 and counters.sum() == 1

"""The root cause of a hang is found from what is left of it, whoever gave up first."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from scheduler_helpers import GraphBuilder, chain
from tri_mpk.scheduler import STEP_EVENT, Events, Schedule, TaskGraph, derive_events, schedule
from tri_mpk.scheduler.self_check import random_schedule
from tri_mpk.scheduler.watchdog import Cause, Diagnosis, StuckWait, diagnose, not_begun, stopped_at, wrap_int32


@dataclass
class Fault:
    """In `epoch` (from 1): a task that does not signal `lost`, a worker that stops at it, or a wait that wants more."""

    task: int
    epoch: int = 1
    lost: tuple[int, ...] = ()
    stops: bool = False
    wants_more: int = 0


class FaultyRun:
    """The kernel with one fault, in random order: until nobody can go on, and then until all have left."""

    def __init__(self, events: Events, queues: Schedule, fault: Fault, first_epoch: int, seed: int) -> None:
        self.events, self.queues, self.fault = events, queues.queues, fault
        self.first_epoch, self.rng = first_epoch, random.Random(seed)
        self.epoch, self.slots = 1, [0] * len(self.queues)
        self.counters = [(first_epoch - 1) * event.count for event in events.events]

    def wanted(self, event: int, task: int | None) -> int:
        count = self.events.events[event].count + (self.fault.wants_more if task == self.fault.task else 0)
        return (self.first_epoch - 1 + self.epoch) * count

    def is_stopped(self, task: int) -> bool:
        return self.fault.stops and (self.epoch, task) == (self.fault.epoch, self.fault.task)

    def step(self, worker: int, gives_up: bool = False) -> bool:
        """Let a worker do its next task; whether it could."""
        queue, slot = self.queues[worker], self.slots[worker]
        if slot == len(queue) or self.is_stopped(queue[slot]):
            return False
        task, event = queue[slot], self.events.wait[queue[slot]]
        if event >= 0 and self.counters[event] < self.wanted(event, task) and not gives_up:
            return False
        for signal in self.events.signals[task]:
            if not ((self.epoch, task) == (self.fault.epoch, self.fault.task) and signal in self.fault.lost):
                self.counters[signal] += 1
        self.slots[worker] += 1
        return True

    def hang(self) -> list[StuckWait]:
        """All waits that may be the first to give up, when nothing moves any more; none if the fault did no harm."""
        while True:
            workers = list(range(len(self.queues)))
            self.rng.shuffle(workers)
            if any(self.step(worker) for worker in workers):
                continue
            if self.counters[STEP_EVENT] < self.wanted(STEP_EVENT, None) or self._blocked():
                return [self._stuck(worker) for worker in workers if not self._has_stopped(worker)]
            if self.epoch > self.fault.epoch:
                return []
            self.epoch, self.slots = self.epoch + 1, [0] * len(self.queues)

    def _blocked(self) -> bool:
        return any(slot < len(queue) for slot, queue in zip(self.slots, self.queues, strict=True))

    def _has_stopped(self, worker: int) -> bool:
        slot = self.slots[worker]
        return slot < len(self.queues[worker]) and self.is_stopped(self.queues[worker][slot])

    def _stuck(self, worker: int) -> StuckWait:
        slot, queue = self.slots[worker], self.queues[worker]
        task = queue[slot] if slot < len(queue) else None
        event = STEP_EVENT if task is None else self.events.wait[task]
        return StuckWait(worker, task, event, wrap_int32(self.counters[event]), wrap_int32(self.wanted(event, task)))

    def unfinished(self) -> set[int]:
        return {task for slot, queue in zip(self.slots, self.queues, strict=True) for task in queue[slot:]}

    def leave(self) -> list[int]:
        for worker in range(len(self.queues)):
            while self.step(worker, gives_up=True):
                pass
        return [wrap_int32(counter) for counter in self.counters]


def outcomes(
    events: Events,
    queues: Schedule,
    fault: Fault,
    first_epoch: int = 1,
    damaged: tuple[int, ...] = (),
    absent: tuple[int, ...] = (),
) -> list[tuple[StuckWait, set[int], Diagnosis]]:
    """Every wait that may be reported, what was not done then, and the diagnosis."""
    run = FaultyRun(events, queues, fault, first_epoch, seed=fault.task)
    waits, unfinished = run.hang(), run.unfinished()
    counters = run.leave()
    return [
        (stuck, unfinished, diagnose(events, queues, counters, wrap_int32(first_epoch), stuck, damaged, absent))
        for stuck in waits
        if stuck.seen != stuck.wanted  # a worker that has no tasks may be past the step event
    ]


def check_chain(events: Events, queues: Schedule, stuck: StuckWait, unfinished: set[int], found: Diagnosis) -> None:
    """Each task waits for the next one or comes after it; all but the last one were certainly not done."""
    if stuck.task is not None:
        assert found.chain[0] == stuck.task
    elif found.chain:
        assert STEP_EVENT in events.signals[found.chain[0]]
    before = {b: a for queue in queues.queues for a, b in zip(queue, queue[1:], strict=False)}
    for later, earlier in zip(found.chain, found.chain[1:], strict=False):
        assert events.wait[later] in events.signals[earlier] or before.get(later) == earlier
    assert unfinished.issuperset(found.chain if found.cause is Cause.STOPPED else found.chain[:-1])


# ---- by hand ----


@pytest.fixture
def plan() -> tuple[TaskGraph, Events, Schedule]:
    """a (tasks 0, 1) writes x, b (2, 3) reads it and writes y, c (4, 5) reads y; every task needs both tiles."""
    graph = chain(num_tiles=2)
    events = derive_events(graph)
    return graph, events, schedule(graph, events, 2)


def test_a_task_that_does_not_signal(plan):
    _, events, queues = plan
    results = outcomes(events, queues, Fault(task=1, lost=(1,)))
    assert [found.cause for _, _, found in results] == [Cause.LOST] * 2
    for stuck, _, found in results:
        assert (stuck.event, stuck.seen, stuck.wanted, found.event, found.missing) == (1, 1, 2, 1, 1)
        assert found.suspects == [0, 1]  # either may have been silent: a counter does not say
        assert found.chain == [stuck.task]


def test_downstream_of_the_fault(plan):
    """c has waited longest, because b's worker was slow; the fault is a's."""
    _, events, queues = plan
    counters = [2, 1, 2]
    found = diagnose(events, queues, counters, 1, StuckWait(worker=1, task=5, event=2, seen=0, wanted=2))
    assert (found.cause, found.chain, found.suspects) == (Cause.LOST, [5, 2], [0, 1])
    found = diagnose(events, queues, counters, 1, StuckWait(1, 5, 2, 0, 2), damaged=[0])
    assert (found.cause, found.chain, found.suspects) == (Cause.DAMAGED, [5, 2, 0], [0])
    found = diagnose(events, queues, counters, 1, StuckWait(0, None, STEP_EVENT, 0, 2))
    assert (found.cause, found.chain[-1]) == (Cause.LOST, 2)


def test_a_worker_that_stops(plan):
    _, events, queues = plan
    for stuck, unfinished, found in outcomes(events, queues, Fault(task=3, stops=True, epoch=2), absent=(1,)):
        assert (stuck.worker, found.cause, found.chain) == (0, Cause.STOPPED, [4, 3])
        check_chain(events, queues, stuck, unfinished, found)
    assert stopped_at(events, queues.queues[0], Counter({2: 1, STEP_EVENT: 1})) == 2
    assert stopped_at(events, queues.queues[0], Counter({2: 2})) is None


def test_a_worker_that_had_not_begun_the_step(plan):
    """It left when the other one had given up; as all signals of their queues are equal, either may have."""
    _, events, queues = plan
    for stuck, unfinished, found in outcomes(events, queues, Fault(task=1, stops=True, epoch=2)):
        assert (stuck.worker, found.cause, found.chain, found.suspects) == (0, Cause.LATE, [2], [0, 1])
        check_chain(events, queues, stuck, unfinished, found)
    everything = Counter({1: 2, 2: 2, STEP_EVENT: 2})
    assert not_begun(events, queues, everything) == [0, 1]
    assert not_begun(events, queues, everything + Counter({1: 1})) == []


def test_a_wait_that_wants_too_much(plan):
    """The worker itself says so; another one can only say what it waits for, unless the host has seen the damage."""
    _, events, queues = plan
    results = outcomes(events, queues, Fault(task=2, wants_more=1))
    assert {stuck.worker: (found.cause, found.chain) for stuck, _, found in results} == {
        0: (Cause.DAMAGED, [2]),
        1: (Cause.LATE, [5]),
    }
    results = outcomes(events, queues, Fault(task=2, wants_more=1), damaged=(2,))
    assert {stuck.worker: (found.cause, found.chain) for stuck, _, found in results} == {
        0: (Cause.DAMAGED, [2]),
        1: (Cause.DAMAGED, [5, 2]),
    }


def test_signals_that_came_late(plan):
    _, events, queues = plan
    found = diagnose(events, queues, [2, 2, 2], 1, StuckWait(worker=0, task=2, event=1, seen=1, wanted=2))
    assert found == Diagnosis(Cause.LATE, [2], [])


def test_the_end_of_a_step():
    """A lone task whose only signal is lost in a later step."""
    builder = GraphBuilder(x=((1,), False))
    builder.op("a")
    builder.task(writes=["x[0:1]"])
    events = derive_events(builder.graph)
    ((stuck, _, found),) = outcomes(events, Schedule([[0]]), Fault(task=0, epoch=3, lost=(0,)))
    assert (stuck.task, found.cause, found.chain, found.suspects) == (None, Cause.LOST, [0], [0])


# ---- at random ----


@pytest.mark.parametrize("first_epoch", [1, 2**31 - 1])
@pytest.mark.parametrize("kind", ["silent", "lost", "behind", "stops", "wants_more", "variant"])
def test_the_planted_fault_is_found(kind: str, first_epoch: int):
    unique = total = 0
    for seed in range(150):
        rng = random.Random(seed)
        graph, events, queues = random_schedule(rng, rng.randint(2, 14), rng.randint(1, 4))
        task = rng.randrange(len(graph.tasks))
        fault = Fault(task, epoch=rng.randint(1, 3), stops=kind in ("stops", "behind"))
        fault.wants_more = int(kind == "wants_more")
        if kind in ("silent", "variant"):
            fault.lost = tuple(events.signals[task])
        elif kind == "lost":
            fault.lost = (rng.choice(events.signals[task]),)
        damaged = (task,) if kind in ("wants_more", "variant") else ()
        if kind == "wants_more":
            fault.epoch = 1  # such a wait hangs at once
        worker = next(w for w, queue in enumerate(queues.queues) if task in queue)
        absent = (worker,) if kind == "stops" else ()
        if kind == "behind":
            fault.task = task = queues.queues[worker][0]
        for stuck, unfinished, found in outcomes(events, queues, fault, first_epoch, damaged, absent):
            assert task in found.suspects, (seed, fault, stuck, found)
            assert (found.cause is Cause.DAMAGED) == bool(damaged)
            check_chain(events, queues, stuck, unfinished, found)
            assert found.chain[-1:] == found.suspects if len(found.suspects) == 1 else task not in found.chain
            unique += found.suspects == [task]
            total += 1
    print(f"{kind}: the task itself was named in {unique} of {total} hangs")
    assert total > 100 and unique > (total - 1 if damaged or absent else total / 3)

"""Two judges that share nothing with `verify`: one run at random with memory, and all runs of a
tiny schedule.

Both model the kernel step by step: waits compare a growing counter with epoch * count, and a worker
passes the step event before its next epoch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from tri_mpk.scheduler.graph import STEP_EVENT, Events, Region, Schedule, TaskGraph

Instance = tuple[int, int]  # (epoch, task): sorts in program order


class Machine:
    """Where every worker stands. A worker does its tasks, then passes the step event, `num_epochs`
    times."""

    def __init__(self, events: Events, schedule: Schedule, num_epochs: int) -> None:
        self.events, self.queues, self.num_epochs = events, schedule.queues, num_epochs

    def start(self) -> tuple[int, ...]:
        return (0,) * len(self.queues)

    def next_of(self, worker: int, progress: tuple[int, ...]) -> tuple[int, int | None] | None:
        """(epoch, task), or (epoch, None) for the step event, or None when the worker has ended."""
        epoch, slot = divmod(progress[worker], len(self.queues[worker]) + 1)
        if epoch == self.num_epochs:
            return None
        queue = self.queues[worker]
        return epoch + 1, queue[slot] if slot < len(queue) else None

    def done(self, progress: tuple[int, ...]) -> Iterator[Instance]:
        for queue, steps in zip(self.queues, progress, strict=True):
            for step in range(steps):
                epoch, slot = divmod(step, len(queue) + 1)
                if slot < len(queue):
                    yield epoch + 1, queue[slot]

    def can_go(self, worker: int, progress: tuple[int, ...], counters: list[int]) -> bool:
        following = self.next_of(worker, progress)
        if following is None:
            return False
        epoch, task = following
        event = STEP_EVENT if task is None else self.events.wait[task]
        return event < 0 or counters[event] >= epoch * self.events.events[event].count

    def counters(self, progress: tuple[int, ...]) -> list[int]:
        counters = [0] * len(self.events.events)
        for _, task in self.done(progress):
            for event in self.events.signals[task]:
                counters[event] += 1
        return counters


def run_at_random(graph: TaskGraph, events: Events, schedule: Schedule, num_epochs: int, seed: int) -> None:
    """Run one interleaving on symbolic memory; every read must see the version that program order
    says."""
    chooser = random.Random(seed)
    machine = Machine(events, schedule, num_epochs)
    expected = _versions_read(graph, [(e + 1, t) for e in range(num_epochs) for t in range(len(graph.tasks))])
    progress, counters, order = list(machine.start()), [0] * len(events.events), []
    while True:
        ready = [w for w in range(len(progress)) if machine.can_go(w, tuple(progress), counters)]
        if not ready:
            break
        worker = chooser.choice(ready)
        epoch, task = machine.next_of(worker, tuple(progress))
        progress[worker] += 1
        if task is not None:
            order.append((epoch, task))
            for event in events.signals[task]:
                counters[event] += 1
    assert len(order) == num_epochs * len(graph.tasks), f"stuck after {order}"
    assert _versions_read(graph, order) == expected


def _versions_read(graph: TaskGraph, order: list[Instance]) -> dict[Instance, list]:
    """What each task instance reads, cell by cell, as the name of the instance that wrote it; and
    the final memory."""
    memory: dict[tuple, Instance] = {}
    seen = {}
    for instance in order:
        task = graph.tasks[instance[1]]
        seen[instance] = [memory.get(cell) for region in task.reads for cell in _cells(region)]
        memory.update((cell, instance) for region in task.writes for cell in _cells(region))
    seen[(0, -1)] = sorted(memory.items())
    return seen


def is_safe(graph: TaskGraph, events: Events, schedule: Schedule, num_epochs: int = 3) -> bool:
    """Visit every reachable state: no deadlock, and no task can run before an earlier one that it
    conflicts with."""
    if _reads_unwritten(graph):
        return False
    machine = Machine(events, schedule, num_epochs)
    size = range(len(graph.tasks))
    conflicts = {t: [u for u in size if conflict(graph, u, t)] for t in size}
    states, seen = [machine.start()], {machine.start()}
    while states:
        progress = states.pop()
        counters, done = machine.counters(progress), set(machine.done(progress))
        ready = [w for w in range(len(progress)) if machine.can_go(w, progress, counters)]
        if not ready and any(machine.next_of(w, progress) for w in range(len(progress))):
            return False  # deadlock
        for worker in ready:
            epoch, task = machine.next_of(worker, progress)
            for earlier in [] if task is None else conflicts[task]:
                # The latest instance before (epoch, task) in program order; those before it are
                # checked at theirs.
                last = (epoch, earlier) if earlier < task else (epoch - 1, earlier)
                if last[0] >= 1 and last not in done:
                    return False
            following = (*progress[:worker], progress[worker] + 1, *progress[worker + 1 :])
            if following not in seen:
                seen.add(following)
                states.append(following)
    return True


def conflict(graph: TaskGraph, a: int, b: int) -> bool:
    touched = [
        [{cell for region in regions for cell in _cells(region)} for regions in (task.reads, task.writes)]
        for task in (graph.tasks[a], graph.tasks[b])
    ]
    (reads_a, writes_a), (reads_b, writes_b) = touched
    return bool(writes_a & writes_b or writes_a & reads_b or reads_a & writes_b)


def _reads_unwritten(graph: TaskGraph) -> bool:
    written: set = set()
    for task in graph.tasks:
        for region in task.reads:
            if not graph.tensors[region.tensor].initialised and not _cells(region) <= written:
                return True
        for region in task.writes:
            written |= _cells(region)
    return False


def _cells(region: Region) -> set[tuple]:
    return {(region.tensor, *point) for point in itertools.product(*(range(*side) for side in region.box))}
